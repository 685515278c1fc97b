"""Test how questions are encoded and answers decoded."""

from __future__ import annotations

import pytest
from aserto.authorizer.v2 import DecisionTreeResponse

from fastapi_topaz import Identity, IdentityType
from fastapi_topaz._authorizer import messages as _messages
from fastapi_topaz._authorizer import resource as _resource
from fastapi_topaz.testing import FakeConnector
from kit.pools import make_pool


async def test_a_mutable_identity_is_encoded_each_time():
    class Changing(Identity):
        pass

    def asked(identity):
        return _messages.is_request("app.GET", ("allowed",), identity, None, None, None)

    changing = Changing(IdentityType.SUB, "alice")
    first = asked(changing)
    assert first == asked(Identity(IdentityType.SUB, "alice"))
    object.__setattr__(changing, "value", "bob")
    assert asked(changing) == asked(Identity(IdentityType.SUB, "bob")) != first


async def test_a_tree_decision_that_is_not_a_boolean_is_an_error():
    tree = DecisionTreeResponse()
    tree.path["app.GET"] = {"allowed": True, "level": "high"}
    connector = FakeConnector(answer=lambda *_: tree.SerializeToString())

    async with make_pool(connector) as pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match="'level' of"):
            await conn.decision_tree(policy_path="app")


# -- the resource context -----------------------------------------------------------


def test_a_value_rejected_by_protobuf_is_named_by_path_only():
    class Fields(dict):
        def __missing__(self, key):
            raise ValueError("refused: secret")

    class Strict:
        """A message of a protobuf that is stricter than the known versions."""

        fields = Fields()

        def SetInParent(self):  # noqa: N802  (protobuf's name)
            pass

    with pytest.raises(ValueError, match="cannot be sent") as caught:
        _resource.fill(Strict(), {"id": "secret"})
    assert str(caught.value) == "resource_context['id'] cannot be sent"
    assert caught.value.__suppress_context__
