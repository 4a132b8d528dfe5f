"""`plan-experts`: what it prints and refuses."""

import json

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.experts import PLACEMENTS
from megatron_cp.experts.slot_costs import copy_bytes, slot_costs
from megatron_cp.hardware.cluster_file import load_cluster
from megatron_cp.report import expert_loads


def run(*words):
    return CliRunner().invoke(app, ["plan-experts", *words], catch_exceptions=True)


def test_every_policy_is_beside_the_load_without_copies():
    result = run("--experts", "8", "--ranks", "4", "--spare", "2", "--json")
    assert result.exit_code == 0, result.exception
    before, *found = json.loads(result.stdout)
    assert (before["policy"], before["copies"], before["lent_bytes"]) == ("none", 0, 0)
    assert [row["policy"] for row in found] == PLACEMENTS.names
    for row in found:
        assert row["copies"] == sum(map(len, row["hosted"]))
        assert row["uneven"] < before["uneven"]
        assert row["lent_bytes"] % copy_bytes(4096, 1536) == 0
    # a policy that looks at times makes none longer
    assert all(row["seconds"] < before["seconds"] for row in found if row["policy"] != "lina")
    table = run("--experts", "8", "--ranks", "4", "--policy", "lina", "--seed", "1").stdout
    assert "lina" in table
    assert "flexmoe" not in table


def test_costs_follow_the_links_that_are_used():
    cluster = load_cluster("dgx-h100-ib")
    near, far = (slot_costs(64, 32, ranks, cluster) for ranks in (8, 16))
    assert near.row == far.row == 3 * 2 * 3 * 64 * 32 / cluster.gemm("bfloat16").rate(32)
    ratio = cluster.inside.bytes_per_s / cluster.between.bytes_per_s
    assert (far.sent / near.sent, far.lent / near.lent) == pytest.approx((ratio, ratio))


def test_loads_are_those_that_a_run_has_recorded(tmp_path):
    folder = tmp_path / "tokens_per_expert"
    folder.mkdir()
    # two experts of four on each rank; the third and the fourth rank have the same as the first two
    for rank, tokens in enumerate(([10, 20], [30, 40], [1, 2], [3, 4])):
        lines = [
            {"iter": 1, "block": "decoder", "layer": 2, "tpe": [[9, 9]]},
            {"iter": 3, "block": "decoder", "layer": 2, "tpe": [tokens, tokens]},
            {"iter": 3, "block": "decoder", "layer": 3, "tpe": [[5, 5]]},
        ]
        # one rank alone has written the last iteration
        lines += [{"iter": 4, "block": "decoder", "layer": 2, "tpe": [[7, 7]]}] if rank == 3 else []
        (folder / f"rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert expert_loads(tmp_path, 2)["decoder layer 2"] == [2 * (10 + 1), 2 * (20 + 2), 2 * (30 + 3), 2 * (40 + 4)]
    assert expert_loads(tmp_path, 2, 2)["decoder layer 2"] == [2 * (10 + 30), 2 * (20 + 40), 2 * (1 + 3), 2 * (2 + 4)]
    words = ("--run", str(tmp_path), "--ranks", "2", "--spare", "1")
    before, *found = json.loads(run(*words, "--json").stdout)
    # 77 and 33 of 110 tokens on the two ranks, twice
    assert before["uneven"] == pytest.approx(77 * 2 / 110)
    assert min(row["uneven"] for row in found) < before["uneven"]
    assert "decoder layer 2" in " ".join(run(*words).stdout.split())
    assert "has no load of experts that 8 ranks wrote" in str(run("--run", str(tmp_path), "--ranks", "8").exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--experts", "10"), "--experts must be a multiple of --ranks 8, got 10; change one of them"),
        (("--policy", "flexmo"), "unknown placement of experts 'flexmo'; did you mean 'flexmoe'"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message):
    assert message in str(run(*words).exception)
