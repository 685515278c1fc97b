"""Calls of an embedded authorizer through a blocking stub."""

from __future__ import annotations

import pathlib
from contextlib import contextmanager

import grpc
import pytest
from aserto.authorizer.v2 import (
    AuthorizerStub,
    DecisionTreeOptions,
    DecisionTreeRequest,
    IsRequest,
    PathSeparator,
    QueryRequest,
)
from aserto.authorizer.v2.api import IdentityContext, PolicyContext
from google.protobuf.json_format import MessageToDict

from fastapi_topaz._authorizer.options import IdentityType


NOBODY = IdentityContext(type=IdentityType.NONE)


OWN_SOCKET = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


@contextmanager
def connect(authorizer, *, url=None, ca=None):
    options = authorizer.options
    target = url or options.url
    if options.insecure:
        channel = grpc.insecure_channel(target, options=OWN_SOCKET)
    else:
        root = pathlib.Path(ca or options.cert_file_path).read_bytes()
        credentials = grpc.ssl_channel_credentials(root)
        channel = grpc.secure_channel(target, credentials, options=OWN_SOCKET)
    with channel:
        yield AuthorizerStub(channel)


def is_request(path="app.GET.x", *decisions, identity=NOBODY, **fields):
    return IsRequest(
        policy_context=PolicyContext(path=path, decisions=decisions or ("allowed",)),
        identity_context=identity,
        **fields,
    )


def decided(response):
    return {d.decision: getattr(d, "is") for d in response.decisions}


def ask(stub, *args, metadata=None, **kwargs):
    request = is_request(*args, **kwargs)
    return decided(stub.Is(request, timeout=10, metadata=metadata))


def status_of(call, *args, **kwargs):
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, timeout=10, **kwargs)
    return caught.value.code(), caught.value.details()


def code_of(call, *args, **kwargs):
    return status_of(call, *args, **kwargs)[0].name


def tree(stub, root, *decisions, slash=False):
    options = DecisionTreeOptions(
        path_separator=PathSeparator.PATH_SEPARATOR_SLASH
        if slash
        else PathSeparator.PATH_SEPARATOR_DOT
    )
    response = stub.DecisionTree(
        DecisionTreeRequest(
            policy_context=PolicyContext(path=root, decisions=decisions),
            identity_context=NOBODY,
            options=options,
        ),
        timeout=10,
    )
    assert response.path_root == root
    return MessageToDict(response.path)


def query(stub, text, **fields):
    request = QueryRequest(query=text, identity_context=NOBODY, **fields)
    return MessageToDict(stub.Query(request, timeout=10).response)["result"]


def is_allowed(response):
    """Return whether the only decision of *response* is an allow."""
    return [getattr(d, "is") for d in response.decisions] == [True]
