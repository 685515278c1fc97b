"""The calls of the authorizer, for whatever can make a gRPC call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fastapi_topaz._authorizer import messages
from fastapi_topaz._authorizer.messages import Subject, policy_instance
from fastapi_topaz._redaction import boundary


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
        identity: On whose behalf; None is an anonymous caller.
        resource_context: What the policy sees as `input.resource`: a mapping of what
            JSON knows.
        policy_instance_name: Which policy instance; None leaves it to the server.
        policy_instance_label: Its label; the name if None.
        timeout: Seconds the server may take, sent along as the deadline; None for
            no limit.

    Raises:
        grpc.aio.AioRpcError: The authorizer answered with an error status, or did
            not answer. On trio, too.
        ConnectionLost: The connection was closed under the call.
        PoolMisuse: The lease was released before.
        TypeError, ValueError: An argument cannot be sent.
    """

    __slots__ = ()

    async def _send(
        self, method: str, request: bytes, timeout: float | None, metadata: Metadata
    ) -> bytes:
        """Make one unary-unary call, from bytes to bytes."""
        raise NotImplementedError

    async def _call(
        self,
        method: Method,
        request: Any,
        timeout: float | None,
    ) -> Any:
        data = method.request(request)
        return method.response(await self._send(method.path, data, timeout, ()))

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
    ) -> dict[str, bool]:
        """
        Ask for decisions (the RPC `Is`).

        Returns:
            Each decision by its name: all that were asked for, and no others. A
            decision is True only if each entry for it in the answer says so.

        Raises:
            grpc.aio.AioRpcError: As all calls. Also, with INTERNAL, if the answer
                lacks a decision, or cannot be read: no decision is not a denial.
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
        return await self._decide(request, names, timeout)

    async def _decide(
        self, request: bytes, names: tuple[str, ...], timeout: float | None
    ) -> dict[str, bool]:
        """Make the RPC `Is` with a *request* for *names* that is encoded already."""
        response = await self._send(messages.IS, request, timeout, ())
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
    ) -> dict[str, dict[str, bool]]:
        """
        Ask for the decisions of all policies below *policy_path*.

        Returns:
            For each path, with the separator asked for, the decisions that were asked
            for, by name. A policy may lack some of them: test with
            `tree[path].get("allowed") is True`.

        Raises:
            TypeError: The answer holds something that is not a decision.
        """
        request = Subject(
            policy_path=policy_path,
            decisions=decisions,
            identity=identity,
            resource_context=resource_context,
            policy_instance_name=policy_instance_name,
            policy_instance_label=policy_instance_label,
        ).decision_tree_request(policy_path_separator)
        data = request.SerializeToString()
        response = await self._send(messages.DECISION_TREE, data, timeout, ())
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
        response: QueryResponse = await self._call(messages.QUERY, request, timeout)
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
    ) -> CompileResponse:
        """Partially evaluate the Rego *query*, leaving *unknowns* open."""
        request = Subject(
            policy_path=policy_path,
            decisions=decisions,
            identity=identity,
            resource_context=resource_context,
            policy_instance_name=policy_instance_name,
            policy_instance_label=policy_instance_label,
        ).compile_request(query, input, unknowns, disable_inlining, options)
        response: CompileResponse = await self._call(messages.COMPILE, request, timeout)
        return response

    @boundary
    async def list_policies(
        self,
        *,
        policy_instance_name: str | None = None,
        policy_instance_label: str | None = None,
        timeout: float | None = None,
    ) -> ListPoliciesResponse:
        """List the policy modules that the server has loaded."""
        instance = policy_instance(policy_instance_name, policy_instance_label)
        response: ListPoliciesResponse = await self._call(
            messages.LIST_POLICIES, messages.list_policies_request(instance), timeout
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
    ) -> GetPolicyResponse:
        """Get one policy module by the id that `list_policies` tells."""
        instance = policy_instance(policy_instance_name, policy_instance_label)
        response: GetPolicyResponse = await self._call(
            messages.GET_POLICY, messages.get_policy_request(id, instance), timeout
        )
        return response

    @boundary
    async def info(self, *, timeout: float | None = None) -> InfoResponse:
        """Ask for the version of the server."""
        response: InfoResponse = await self._call(
            messages.INFO, messages.info_request(), timeout
        )
        return response
