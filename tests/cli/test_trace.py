import json

import pytest
from typer.testing import CliRunner

from megatron_cp.cli import app
from megatron_cp.context import BACKENDS
from tests.context.trace.broken import swap_owners

PASS = {"work", "sent", "received", "peak", "time", "ideal"}
SMALL = ("--ranks", "4", "--seq", "1024", "--heads", "8", "--kv-heads", "2", "--head-dim", "64")

CLUSTER = """\
compute:
  dtype: bfloat16
  peak_tflops: 100
  efficiency_forward: 0.5
  efficiency_backward: 0.5
  call_us: 5
memory:
  peak_gb_per_s: 1000
  efficiency: 0.8
ranks_per_node: 2
inside:
  peak_gb_per_s: 100
  efficiency: 1
  latency_us: 5
  ports: shared
between:
  peak_gb_per_s: 10
  efficiency: 1
  latency_us: 10
  ports: shared
"""


def run(*words):
    return CliRunner().invoke(app, ["trace", *words])


@pytest.mark.parametrize("backend", BACKENDS.names)
def test_one_object_with_the_proof_and_both_passes(backend):
    result = run("--backend", backend, *SMALL, "--causal", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["covered"] is True
    assert found["grid"] == ([2, 2] if BACKENDS.get(backend).needs_grid else None)
    for name in ("forward", "backward"):
        one = found[name]
        assert set(one) >= PASS
        assert all(len(one[key]) == 4 for key in ("work", "sent", "received", "peak"))
        assert sum(one["work"]) == 8 * 1024 * 1025 // 2
        assert sum(one["sent"]) == sum(one["received"]) > 0
        assert one["time"] >= one["ideal"] > 0


def test_a_window_costs_less():
    full, window = (
        json.loads(run("--backend", "zigzag", *SMALL, "--causal", *more, "--json").stdout)["forward"]
        for more in ((), ("--window", "100"))
    )
    assert sum(window["work"]) == 8 * (101 * 1024 - 100 * 101 // 2)
    assert sum(window["sent"]) < sum(full["sent"])


def test_what_latents_send_is_said_beside_keys_and_values():
    words = ("--backend", "zigzag", *SMALL, "--kv-heads", "8", "--latent", "32", "16")
    found = json.loads(run(*words, "--json").stdout)
    for name in ("forward", "backward"):
        assert 0 < sum(found["latents"][name]) < sum(found[name]["sent"])
    # of 48 numbers, in place of the keys and values of 8 heads of 64
    assert sum(found["latents"]["forward"]) / sum(found["forward"]["sent"]) == 48 / (2 * 8 * 64)
    sent = max(found["latents"]["forward"]) / 2**20
    assert f"forward: with --cp-latent {sent:.1f} MiB are sent by the rank with most, in place of" in run(*words).stdout


def test_tables_say_what_was_proved():
    result = run("--backend", "ring", *SMALL, "--causal")
    assert result.exit_code == 0, result.output
    assert "is computed exactly once in each pass" in result.stdout
    assert "bring tokens into place" in result.stdout
    assert "pairs x" in result.stdout


def test_a_broken_loop_is_not_covered(monkeypatch):
    swap_owners(monkeypatch)
    result = run("--backend", "zigzag", *SMALL, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["covered"] is False


def test_pictures_and_events(tmp_path):
    files = [tmp_path / name for name in ("trace.png", "trace.svg", "trace.json")]
    result = run(
        "--backend", "ulysses", "--no-causal", *SMALL, *(word for file in files for word in ("--plot", str(file)))
    )
    assert result.exit_code == 0, result.output
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert all(str(file) in result.stderr for file in files)
    drawn = files[1].read_text()
    assert "<svg" in drawn
    # matplotlib writes a comment with each text
    for text in (
        "sends inside the node",
        "waits, idle",
        "ranks 0-3",
        "on the cluster h100-ib, bfloat16",
        "heads of 64",
    ):
        assert f"<!-- {text}" in drawn or text in drawn, text
    events = json.loads(files[2].read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "M"} == {"process_name", "thread_name"}
    kernels = [event for event in events if event["name"] == "kernels"]
    assert sum(event["args"]["work"] for event in kernels) == 2 * 8 * 1024**2
    assert [event["ph"] for event in events].count("b") == [event["ph"] for event in events].count("e") > 0


def test_a_cluster_of_one_s_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(CLUSTER)
    found = json.loads(run("--backend", "zigzag", "--no-causal", *SMALL, "--cluster", str(file), "--json").stdout)
    assert sum(found["forward"]["sent_between_nodes"]) == sum(found["forward"]["sent"]) / 2
    assert found["cluster"] == "mine"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("  latency_us: 10\n", "", ":16: between.latency_us is missing; give a number"),
        ("  peak_gb_per_s: 10\n", "  peak_gb_per_s: -10\n", ":17: between.peak_gb_per_s must be a positive number"),
        (
            "  peak_gb_per_s: 10\n",
            f"  peak_gb_per_s: {'9' * 400}\n",
            ":17: between.peak_gb_per_s must be below 1e+30, got 9",
        ),
        ("  peak_gb_per_s: 10\n", f"  peak_gb_per_s: {'9' * 5000}\n", ": not YAML: "),
        ("  peak_tflops: 100\n", "  peak_tflops: many\n", ":3: compute.peak_tflops must be a positive number"),
        ("ranks_per_node: 2\n", "", ":1: ranks_per_node is missing"),
        ("ranks_per_node: 2\n", "ranks_per_node: 1.5\n", ":10: ranks_per_node must be a whole number, got 1.5"),
        ("memory:\n", "memory:\n  loss_gb_per_s: 0\n", ":8: memory.loss_gb_per_s must be a positive number, got 0"),
        ("  efficiency: 0.8\n", "  efficiency: 80\n", ":9: memory.efficiency must be a share of the peak, at most 1"),
        ("  call_us: 5\n", "  call_ms: 5\n", ":6: unknown key 'compute.call_ms'; did you mean 'compute.call_us'?"),
        (
            "ports: shared\nbetween",
            "ports: sharing\nbetween",
            ":15: inside.ports must be one of: shared, per-neighbour",
        ),
        ("compute:\n", "compute: 3\nother:\n", ":2: unknown key 'other'"),
        ("memory:\n", "  - memory:\n", ":7: "),
        (
            "memory:\n",
            "gemm:\n  bfloat16: {peak_tflops: 9, efficiency: {128: 0.2, x: 0.4}}\nmemory:\n",
            ":8: efficiency maps sizes of a product's smallest dimension to shares",
        ),
        (
            "memory:\n",
            "gemm:\n  bfloat16: {peak_tflops: 9, efficiency: {true: 0.2}}\nmemory:\n",
            ":8: efficiency maps sizes of a product's smallest dimension to shares",
        ),
    ],
)
def test_a_bad_cluster_is_one_line_with_file_and_line(tmp_path, before, after, message):
    file = tmp_path / "mine.yaml"
    assert before in CLUSTER
    file.write_text(CLUSTER.replace(before, after))
    result = run("--backend", "zigzag", *SMALL, "--cluster", str(file))
    assert result.exit_code != 0
    assert f"{file}{message}" in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "tokenrink"], "did you mean 'tokenring'"),
        (["--cluster", "h100"], "no cluster 'h100'; did you mean 'h100-ib'?"),
        (["--seq", "1025"], "needs S divisible by 2 * context_parallel_size = 8, got S = 1025; pad to 1032"),
        (["--backend", "ulysses", "--heads", "2"], "4 ranks cannot share 2 query heads"),
        (["--plot", "trace.gif"], "--plot takes a file that ends in one of"),
        (["--backend", "usp", "--hierarchical-context-parallel-sizes", "3", "2"], "must multiply to --ranks 4"),
        (["--hierarchical-context-parallel-sizes", "2", "2"], "has no effect on --backend zigzag; leave it out or use"),
        (["--backend", "auto", "--placement", "context-first"], "with backend 'auto', which does not ask"),
        (["--backend", "startrail", "--hierarchical-context-parallel-sizes", "4", "1"], "possible are 1, 2, backend"),
        (["--layout", "zigzak"], "unknown layout 'zigzak'; did you mean 'zigzag'"),
        (["--backend", "rsa", "--seq", str(2**31)], "'rsa' holds whole rows of scores, 3.69e+19 bytes on a rank"),
        (["--backend", "ulysses", "--latent", "32", "16"], "'ulysses' sends keys and values, no latent; use backend"),
        (["--latent", "32", "65"], "--latent takes 1 or more compressed numbers and 0 to --head-dim 64 rotary ones"),
        (["--latent", "32", "16"], "expands to keys of all --heads 8 at once, got --kv-heads 2; leave it out"),
        (["--cut"], "--cut needs --documents, got none"),
        (["--document-layout", "block"], "unknown document layout 'block'; did you mean 'blocks'"),
        (["--dtype", "float32"], "the rates of cluster 'h100-ib' hold for bfloat16"),
    ],
)
def test_bad_input_is_refused(words, message):
    result = run("--backend", "zigzag", *SMALL, *words)
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_more_chunks_keep_less_alive():
    two, four = (
        json.loads(run("--backend", "fpdt", *SMALL, "--causal", "--chunks", str(chunks), "--json").stdout)
        for chunks in (2, 4)
    )
    assert (two["chunks"], four["chunks"]) == (2, 4)
    assert max(four["forward"]["peak"]) < max(two["forward"]["peak"])


def test_longer_stripes_are_fewer_tiles_of_the_same_pairs():
    single, blocks = (
        json.loads(run("--backend", "striped", *SMALL, "--causal", "--stripe", stripe, "--json").stdout)
        for stripe in ("1", "16")
    )
    assert (single["stripe"], blocks["stripe"]) == (1, 16)
    assert blocks["covered"]
    assert sum(blocks["forward"]["work"]) == sum(single["forward"]["work"])
    assert blocks["forward"]["work"] != single["forward"]["work"]


LAID = (
    "--backend",
    "all-gather",
    "--ranks",
    "2",
    "--seq",
    "512",
    "--heads",
    "2",
    "--documents",
    "30,300,182",
    "--causal",
)


def test_a_layout_of_documents_is_proved_with_its_moves_or_without():
    moved, cut, stream = (
        json.loads(run(*LAID, "--json", *words).stdout)
        for words in (("--document-layout", "blocks"), ("--document-layout", "blocks", "--cut"), ())
    )
    assert moved["covered"]
    assert cut["covered"]
    assert min(moved["relayout"]) > max(cut["relayout"]) == 0
    assert max(cut["forward"]["work"]) < max(stream["forward"]["work"])
    assert sum(cut["forward"]["work"]) == sum(stream["forward"]["work"])


def test_the_layout_that_is_faster_by_prediction_is_named():
    result = run(*LAID, "--document-layout", "auto", "--cut")
    assert "document layout: stream is faster by prediction" in result.stdout
