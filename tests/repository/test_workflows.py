"""The workflows of GitHub run what nox runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text())


def jobs_of(name):
    # BaseLoader keeps `on` and 3.10 as text.
    text = (ROOT / ".github" / "workflows" / name).read_text()
    return yaml.load(text, yaml.BaseLoader)["jobs"]


def told_by_nox(target):
    """Return the texts of the collection that noxfile.py assigns to *target*."""
    for node in NOXFILE.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == target:
            elements = getattr(node.value, "elts", None) or node.value.keys
            return [each.value for each in elements if isinstance(each, ast.Constant)]
    raise LookupError(target)


def test_each_session_of_nox_is_a_job():
    matrix = jobs_of("ci.yml")["sessions"]["strategy"]["matrix"]
    assert matrix["session"] == told_by_nox("nox.options.sessions")


def test_the_tests_run_on_each_supported_python():
    matrix = jobs_of("ci.yml")["tests"]["strategy"]["matrix"]
    assert matrix["python"] == told_by_nox("SUPPORTED")


def test_each_part_of_nightly_is_a_job():
    matrix = jobs_of("nightly.yml")["part"]["strategy"]["matrix"]
    assert matrix["part"] == told_by_nox("NIGHTLY")


def test_one_check_needs_all_others_and_runs_even_if_one_fails():
    jobs = jobs_of("ci.yml")
    required = jobs.pop("required")
    assert required["needs"] == list(jobs)
    assert required["if"] == "always()"
    (step,) = required["steps"]
    wanted = " ".join(["success"] * len(jobs))
    assert f'[ "$RESULTS" = "{wanted}" ]' in step["run"]


def test_the_wheel_is_built_first():
    jobs = jobs_of("ci.yml")
    assert "needs" not in jobs["wheel"]
    assert all(job.get("needs") for name, job in jobs.items() if name != "wheel")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read(workflow):
    text = workflow.read_text()
    assert yaml.load(text, yaml.BaseLoader)["permissions"] == {"contents": "read"}
    jobs = jobs_of(workflow.name)
    assert not any("permissions" in job for job in jobs.values())
    # A value of an event in a script would be run as a part of it.
    for job in jobs.values():
        assert int(job["timeout-minutes"]) > 0
        for step in job["steps"]:
            assert "github.event" not in step.get("run", "")
    assert all(re.search(r"@v\d+$", used) for used in re.findall(r"uses: (\S+)", text))
