"""The calls of the authorizer, as a base class for objects that make gRPC calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fastapi_topaz._authorizer import messages
from fastapi_topaz._authorizer.messages import Subject, policy_instance
from fastapi_topaz._redaction import boundary
from fastapi_topaz._rpc.metadata import checked_metadata


if TYPE_CHECKING:
    from collections.abc import Sequence

    from aserto.authorizer.v2 import (
        CompileResponse,
        GetPolicyResponse,
        InfoResponse,
        ListPoliciesResponse,
        QueryOptions,
        QueryResponse,
    )

    from fastapi_topaz._authorizer.messages import Method
    from fastapi_topaz._authorizer.options import IdentityLike
    from fastapi_topaz._authorizer.resource import ResourceContext
    from fastapi_topaz._rpc.metadata import Metadata


__all__ = ["AuthorizerCalls"]


class AuthorizerCalls:
    """
    The methods of `aserto.authorizer.v2.Authorizer`.

    Arguments mean the same everywhere:

    Args:
        policy_path: The package of the policy, such as `myapp.GET.documents`.
        decisions: The names of the decisions to make, default `("allowed",)`.
        identity: The identity to check. None, the default, is an anonymous caller.
        resource_context: The value of `input.resource` in the policy: a mapping of
            JSON values. Default None.
        policy_instance_name: The policy instance. With None, the default, the server
            chooses it.
        policy_instance_label: The label of the instance. None, the default, means
            its name.
        timeout: Time limit in seconds, sent to the server as the deadline. None, the
            default, means no limit.
        metadata: Pairs of key and value, or a `grpc.aio.Metadata`. They are sent with
            this call, in addition to those of the options. They may be secret, so no
            error shows them. None, the default, means none.

    Raises:
        grpc.aio.AioRpcError: The authorizer answered with an error status, or did
            not answer. Also on trio.
        ConnectionLost: The connection was closed during the call.
        CredentialsFailed: The `credentials` of the options failed.
        PoolMisuse: The lease is already released.
        TypeError, ValueError: An argument cannot be sent.
    """

    __slots__ = ()

    async def _send(
        self, method: str, request: bytes, timeout: float | None, metadata: Metadata
    ) -> bytes:
        """Make one unary-unary call with an encoded request, and return the bytes."""
        raise NotImplementedError

    async def _call(
        self,
        method: Method,
        request: Any,
        timeout: float | None,
        metadata: Metadata | None,
    ) -> Any:
        pairs = checked_metadata(metadata)
        data = method.request(request)
        return method.response(await self._send(method.path, data, timeout, pairs))

    @boundary
    async def decisions(
        self,
        *,
        policy_path: str,
        decisions: Sequence[str] = ("allowed",),
        identity: IdentityLike | None = None,
        resource_context: ResourceContext | None = None,
        policy_instance_name: str | None = None,
        policy_instance_label: str | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> dict[str, bool]:
        """
        Ask for decisions (the RPC `Is`).

        Returns:
            Exactly the requested decisions, by name. A decision is True only if each
            entry for it in the answer is true.

        Raises:
            grpc.aio.AioRpcError: As for all calls. Also, with INTERNAL, if the answer
                lacks a decision or cannot be read. A missing decision is not a denial.
        """
        names = messages.names_of(decisions)
        request = messages.is_request(
            policy_path,
            names,
            identity,
            resource_context,
            policy_instance_name,
            policy_instance_label,
        )
        return await self._decide(request, names, timeout, checked_metadata(metadata))

    async def _decide(
        self,
        request: bytes,
        names: tuple[str, ...],
        timeout: float | None,
        metadata: Metadata,
    ) -> dict[str, bool]:
        """Make the RPC `Is` with an encoded *request* for the decisions *names*."""
        response = await self._send(messages.IS, request, timeout, metadata)
        return messages.decisions_of(response, names)

    @boundary
    async def decision_tree(
        self,
        *,
        policy_path: str,
        decisions: Sequence[str] = ("allowed",),
        identity: IdentityLike | None = None,
        resource_context: ResourceContext | None = None,
        policy_instance_name: str | None = None,
        policy_instance_label: str | None = None,
        policy_path_separator: Literal["DOT", "SLASH"] | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> dict[str, dict[str, bool]]:
        """
        Ask for the decisions of all policies below *policy_path*.

        Returns:
            For each path, the requested decisions by name. Paths use the separator
            *policy_path_separator*. A policy may lack a decision, so test with
            `tree[path].get("allowed") is True`.

        Raises:
            TypeError: The answer contains a value that is not a decision.
        """
        request = Subject(
            policy_path=policy_path,
            decisions=decisions,
            identity=identity,
            resource_context=resource_context,
            policy_instance_name=policy_instance_name,
            policy_instance_label=policy_instance_label,
        ).decision_tree_request(policy_path_separator)
        pairs = checked_metadata(metadata)
        data = request.SerializeToString()
        response = await self._send(messages.DECISION_TREE, data, timeout, pairs)
        return messages.decision_tree_of(response, request.policy_context.decisions)

    @boundary
    async def query(
        self,
        *,
        query: str,
        input: str = "",  # noqa: A002  (the field's name)
        policy_path: str = "",
        decisions: Sequence[str] = (),
        identity: IdentityLike | None = None,
        resource_context: ResourceContext | None = None,
        policy_instance_name: str | None = None,
        policy_instance_label: str | None = None,
        options: QueryOptions | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> QueryResponse:
        """Evaluate the Rego *query* with *input*, a JSON text."""
        request = Subject(
            policy_path=policy_path,
            decisions=decisions,
            identity=identity,
            resource_context=resource_context,
            policy_instance_name=policy_instance_name,
            policy_instance_label=policy_instance_label,
        ).query_request(query, input, options)
        response: QueryResponse = await self._call(
            messages.QUERY, request, timeout, metadata
        )
        return response

    @boundary
    async def compile(
        self,
        *,
        query: str,
        input: str = "",  # noqa: A002  (the field's name)
        unknowns: Sequence[str] = (),
        disable_inlining: Sequence[str] = (),
        policy_path: str = "",
        decisions: Sequence[str] = (),
        identity: IdentityLike | None = None,
        resource_context: ResourceContext | None = None,
        policy_instance_name: str | None = None,
        policy_instance_label: str | None = None,
        options: QueryOptions | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> CompileResponse:
        """Partially evaluate the Rego *query*. The values *unknowns* stay open."""
        request = Subject(
            policy_path=policy_path,
            decisions=decisions,
            identity=identity,
            resource_context=resource_context,
            policy_instance_name=policy_instance_name,
            policy_instance_label=policy_instance_label,
        ).compile_request(query, input, unknowns, disable_inlining, options)
        response: CompileResponse = await self._call(
            messages.COMPILE, request, timeout, metadata
        )
        return response

    @boundary
    async def list_policies(
        self,
        *,
        policy_instance_name: str | None = None,
        policy_instance_label: str | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> ListPoliciesResponse:
        """List the policy modules that the server has loaded."""
        instance = policy_instance(policy_instance_name, policy_instance_label)
        response: ListPoliciesResponse = await self._call(
            messages.LIST_POLICIES,
            messages.list_policies_request(instance),
            timeout,
            metadata,
        )
        return response

    @boundary
    async def get_policy(
        self,
        *,
        id: str,  # noqa: A002  (the field's name)
        policy_instance_name: str | None = None,
        policy_instance_label: str | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> GetPolicyResponse:
        """Get one policy module by its id, which `list_policies` returns."""
        instance = policy_instance(policy_instance_name, policy_instance_label)
        response: GetPolicyResponse = await self._call(
            messages.GET_POLICY,
            messages.get_policy_request(id, instance),
            timeout,
            metadata,
        )
        return response

    @boundary
    async def info(
        self, *, timeout: float | None = None, metadata: Metadata | None = None
    ) -> InfoResponse:
        """Get the version of the server."""
        response: InfoResponse = await self._call(
            messages.INFO, messages.info_request(), timeout, metadata
        )
        return response
