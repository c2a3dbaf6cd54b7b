"""A list of digests covers all files of a step, and no other ones."""

import pytest

from crossmae_jax.checkpoints import digests

FILES = ("variables/a", "variables/deep/b", "variables/deep/.zarray", "optimizer/c")


@pytest.fixture
def step(tmp_path):
    for name in FILES:
        path = tmp_path / "20" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    digests.write(tmp_path / "20")
    assert _damage(tmp_path / "20") is None
    return tmp_path / "20"


def _damage(step, parts=("variables", "optimizer")):
    return digests.damage(step, parts)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("harmed", [False, True])
def test_a_line_that_is_removed_hides_no_damage(step, name, harmed):
    path = step / digests.LIST
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.endswith(f"{name}\n")))
    if harmed:
        (step / name).write_text("other weights")
    assert _damage(step) == f"SHA256SUMS lacks {name}"
    assert _damage(step, ["variables"]) == f"SHA256SUMS lacks {name}"
    assert _damage(step, ["optimizer"]) is None


def test_files_that_came_later_are_named_a_few_of_them(step):
    for k in range(5):
        (step / "optimizer" / f"new{k}").write_text("")
    assert _damage(step) == (
        "SHA256SUMS lacks optimizer/new0, optimizer/new1 and 3 more"
    )
    assert _damage(step, ["variables"]) is None


def test_what_systems_leave_behind_is_no_damage(step):
    for name in (".DS_Store", "._a", ".nfs000000002a"):
        (step / "variables/deep" / name).write_text("")
    (step / "notes.txt").write_text("beside the list anything may lie")
    assert _damage(step) is None


@pytest.mark.parametrize("name", ["../outside", "variables/../../outside"])
def test_names_that_lead_out_of_a_step_vouch_for_nothing(step, name):
    (step.parent / "outside").write_text("variables/a")
    path = step / digests.LIST
    path.write_text(path.read_text().replace("variables/a", name))
    assert _damage(step) == "SHA256SUMS lacks variables/a"
