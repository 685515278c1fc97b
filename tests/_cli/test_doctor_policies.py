"""Test what `doctor` says about the packages of policies, without a server."""

from __future__ import annotations

import pytest

from fastapi_topaz._cli.doctor.findings import Level
from fastapi_topaz._cli.doctor.policies import missing_policy, root_finding


PACKAGES = {"shop.GET.orders.__id", "shop.GET.orders", 'shop.GET["user-profiles"]'}


def remedy_for(path, packages=frozenset(PACKAGES)):
    return missing_policy(packages, path, "here").remedy


@pytest.mark.parametrize(
    "path, shorter",
    [
        ("shop.GET.orders.__id.allowed", "shop.GET.orders.__id"),
        ('shop.GET.orders["allowed"]', "shop.GET.orders"),
        ('shop.GET["user-profiles"].allowed', 'shop.GET["user-profiles"]'),
    ],
)
def test_a_path_that_ends_with_the_decision_gets_the_path_without_it(path, shorter):
    assert (
        "`allowed` is the name of the decision, and not a part of the path: pass "
        f"--policy-path '{shorter}', which is a package of Topaz."
    ) in remedy_for(path)


@pytest.mark.parametrize("packages", [(), ("other",)])
def test_the_decision_is_named_also_if_the_rest_is_unknown(packages):
    assert "pass --policy-path 'shop.x'." in remedy_for("shop.x.allowed", packages)


@pytest.mark.parametrize("path", ["shop.GET.order", "allowed", "shop.allowed.orders"])
def test_other_paths_get_no_hint_about_the_decision(path):
    assert "name of the decision" not in remedy_for(path)


def test_a_path_that_begins_with_data_is_named():
    assert "begins without `data`" in remedy_for("data.shop.GET.orders")
    assert "begins without `data`" not in remedy_for("shop.GET.order")


@pytest.mark.parametrize("path", ["shop.GET.orders", 'shop["GET"].orders'])
def test_a_package_that_exists_is_not_listed_as_missing(path):
    remedy = remedy_for(path)
    assert f"Topaz has the package {path}" in remedy
    assert "closest" not in remedy


def test_the_ten_closest_packages_are_listed_the_closest_first():
    packages = {f"shop.GET.orders{number}" for number in range(30)} | {"zzz", "qqq"}
    [said] = [
        each for each in remedy_for("shop.GET.orders7x", packages).split(". ")
        if "closest" in each
    ]  # fmt: skip
    names = said.removeprefix("The closest of the 32 packages: ").split(", ")
    assert len(names) == 10
    assert names[0] == "shop.GET.orders7"
    assert "zzz" not in names


def test_a_long_package_is_cut_and_control_characters_are_replaced():
    remedy = remedy_for("shop", {"x" * 300, "a\x1b[31m"})
    assert "x" * 100 + "..." in remedy
    assert "x" * 101 not in remedy
    assert "a?[31m" in remedy


def test_without_a_list_there_is_only_the_remedy_of_the_catalogue():
    assert remedy_for("shop.GET.order", ()).startswith("Declare that package")


@pytest.mark.parametrize(
    "root, level",
    [
        ("shop", Level.OK),
        ('shop["GET"]', Level.OK),
        ('shop.GET["user-profiles"]', Level.OK),
        ("sho", Level.PROBLEM),
        ("GET", Level.PROBLEM),
        ("shop.GET.orders.__id.x", Level.PROBLEM),
    ],
)
def test_a_root_is_compared_by_its_parts(root, level):
    assert root_finding(PACKAGES, root, "here").level is level
