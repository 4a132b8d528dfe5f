"""The real pretrain() with our linears gives the losses and norms of one rank, and sends what the formulas say."""

from typing import NamedTuple

import pytest

from megatron_cp.pipeline.action import FULL, WEIGHT, halves
from megatron_cp.pipeline.build import build
from megatron_cp.pipeline.execute import lower
from megatron_cp.tensor.cost import LayerLinears
from megatron_cp.tensor.traffic import LinearSize, SentElements, grid_backward, grid_forward, heads_exchange, rest
from tests.cases import slow_unless
from tests.megatron.pretraining import from_the_rank_with_losses, losses_of_each_iteration, start_from_names, tiny
from tests.ranks import run_ranks, run_ranks_with_log
from tests.tolerances import BF16_STEP, GRAD_NORM_DIGITS, LOSS_DIGITS

HIDDEN, FFN, QUERY, KEY_VALUE, SEQUENCE, BATCH, ITERATIONS = 64, 96, 64, 64, 32, 2, 3
MODEL = f"--num-attention-heads 8 --num-query-groups 4 --hidden-size {HIDDEN} --ffn-hidden-size {FFN}"
MODEL += f" --train-iters {ITERATIONS}"
DEEP = "--num-layers 4 --global-batch-size 8"
DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
OURS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


class Run(NamedTuple):
    """Losses and norms of a run, the names of the classes of its linears, and the bytes that they sent on this rank.

    stream_k: products that its kernel computed
    output:   name of the class of its output layer; empty where the rank has none
    """

    log: list
    linears: set[str]
    sent: int
    stream_k: int = 0
    output: str = ""


def trained_with_linears(flags, frozen=()):
    """Train from named weights, those of `frozen` linears held, and look at the linears afterwards."""
    import sys

    from megatron_cp.megatron.process import pretrain
    from megatron_cp.megatron.process.launch import launched
    from megatron_cp.megatron.tensor.linears import output_layers

    built = []

    def freeze(models):
        built.extend(models)
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not any(f"{linear}.weight" in name for linear in frozen))
        return models

    def prepare(config):
        start_from_names(config)
        config.pre_wrap_hooks.append(freeze)

    sys.argv = ["pretrain_gpt", *flags]
    with launched(flags), losses_of_each_iteration() as log:
        pretrain.run(prepare=prepare)
        log = from_the_rank_with_losses(log)
    linears = [
        module
        for model in built
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in OURS and not module.is_expert
    ]
    outputs = output_layers(built)
    placed = [placed for module in [*linears, *outputs] if (placed := getattr(module, "placed", None))]
    engines = [engine for each in placed for engine in getattr(each, "engines", each)]
    fabrics = {id(engine.fabric): engine.fabric for engine in engines}
    products = {id(engine.product): engine.product for engine in engines}
    return Run(
        log,
        {type(module).__name__ for module in linears},
        sum(fabric.sent for fabric in fabrics.values()),
        sum(getattr(product, "calls", 0) for product in products.values()),
        "".join(type(layer).__name__ for layer in outputs),
    )


def run(world_size, *flags):
    return run_ranks(world_size, trained_with_linears, tiny(MODEL, *flags))[0]


BF16 = "--bf16 --train-iters 4"
STOCK = {"ColumnParallelLinear", "RowParallelLinear"}
PLACED = {"GridColumnLinear", "GridRowLinear"}


def tensor(size, scheme):
    return f"--tensor-model-parallel-size {size} --sequence-parallel --tp-comm-type {scheme}"


@pytest.fixture(scope="module")
def alone():
    """Runs on one rank, by their flags, each made once."""
    runs = {}

    def made(*flags):
        if flags not in runs:
            found = run(1, *flags)
            assert (found.linears, found.output) == (STOCK, "ColumnParallelLinear")
            runs[flags] = found.log
        return runs[flags]

    return made


def assert_equal_logs(found, expected):
    assert [step["iteration"] for step in found] == [step["iteration"] for step in expected]
    for step, other in zip(found, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=10**-LOSS_DIGITS)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=10**-GRAD_NORM_DIGITS)


def assert_equal_runs(found, expected):
    assert found.linears == PLACED
    assert found.output in ("OutputLinear", "")
    assert_equal_logs(found.log, expected)


class Load(NamedTuple):
    """What one rank of a run does, by which the formulas give the bytes that its linears send.

    micros:    microbatches of all iterations
    tokens:    of one in a tensor-parallel group
    key_value: features of keys and values of all ranks
    first:     outputs of the MLP's first linear
    apart:     share of backwards whose weight gradients have a turn of their own
    forwards:  runs of each layer's forward
    outputs:   output layers of this rank
    frozen:    linears without a weight gradient
    """

    grid: tuple[int, int]
    layers: int = 2
    micros: int = 2 * ITERATIONS
    tokens: int = SEQUENCE * BATCH
    key_value: int = KEY_VALUE
    first: int = 2 * FFN
    apart: float = 0.0
    forwards: int = 1
    outputs: int = 1
    frozen: tuple[str, ...] = ()

    @property
    def sent(self):
        """Bytes that this rank sends for its linears in the whole run."""
        passes = SentElements()
        sizes = (
            LinearSize(self.tokens, HIDDEN, QUERY + self.key_value, True),
            LinearSize(self.tokens, QUERY, HIDDEN, False),
            LinearSize(self.tokens, HIDDEN, self.first, True),
            LinearSize(self.tokens, FFN, HIDDEN, False),
        )
        for name, size in zip(OURS, sizes, strict=True):
            passes = passes.plus(grid_forward(size, *self.grid), self.forwards)
            if name in self.frozen:
                passes = passes.plus(self._input_gradient(size))
                continue
            passes = passes.plus(grid_backward(size, *self.grid), 1 - self.apart)
            passes = passes.plus(grid_backward(size, *self.grid, split=True), self.apart)
        heads = heads_exchange(self.tokens, QUERY + self.key_value + QUERY, *self.grid)
        passes = passes.plus(heads, 1 + self.forwards)
        # the output layer has all ranks in one dimension; the size of the vocabulary does not matter
        ranks, output = self.grid[0] * self.grid[1], LinearSize(self.tokens, HIDDEN, 1, True)
        ends = grid_forward(output, ranks, 1).plus(grid_backward(output, ranks, 1))
        return 4 * self.micros * (self.layers * passes.total + self.outputs * ends.total)

    def _input_gradient(self, size):
        """The weight is gathered, dy gathered or dx scattered; x is not gathered again, and no gradient scattered."""
        tokens, weights = self.grid
        activations = size.tokens / weights * HIDDEN * rest(tokens)
        weight = size.weight / tokens * rest(weights)
        if size.column:
            return SentElements(gather=weight, scatter=activations)
        return SentElements(gather=weight + activations)


CASES = {
    "flux": (4, "flux", (4, 1)),
    "2x2": (4, "2d", (2, 2)),
    "2x2 by collectives": (4, "2d --tp-engine collective", (2, 2)),
    "1x4, weights alone": (4, "2d --tp-grid 1 4", (1, 4)),
}
BANNERS = (
    "linears of attention and MLPs: 2d, tokens x weights = 2 x 2, engine ring, TP=4",
    "output layer: flux, engine ring, TP=4",
)


@pytest.mark.parametrize("case", slow_unless(["2x2"], CASES))
def test_a_scheme_equals_one_rank_and_sends_what_its_formula_says(alone, case):
    size, scheme, grid = CASES[case]
    runs, log = run_ranks_with_log(size, trained_with_linears, tiny(MODEL, tensor(size, scheme)))
    found = runs[0]
    assert_equal_runs(found, alone())
    assert found.output == "OutputLinear"
    # 2 microbatches in each iteration and 2 layers, of which a rank has all
    assert found.sent == Load(grid).sent
    for banner in BANNERS if case == "2x2" else ():
        assert f"[megatron-cp] {banner}" in log


@pytest.mark.slow
def test_a_cube_equals_one_rank_sends_what_its_formula_says_and_its_checkpoint_moves(alone, tmp_path):
    groups = "--num-query-groups 8"
    reshardable = f"{DISTRIBUTED} --lr-decay-iters 3"
    expected = alone(groups)
    saving = f"--train-iters 2 --save {tmp_path} --save-interval 2"
    first = run(8, tensor(8, "3d"), groups, reshardable, saving)
    assert first.linears == {*PLACED, "CubeParallelLinear"}
    layer = LayerLinears(SEQUENCE * BATCH, HIDDEN, 3 * QUERY, QUERY, 2 * FFN, FFN)
    # 2 iterations of 2 microbatches in 2 layers
    outputs = Load((8, 1), layers=0, micros=4).sent
    assert first.sent == 8 * 4 * layer.sent_on_cube(2, split=False) + outputs
    second = run(2, tensor(2, "1d"), groups, reshardable, f"--load {tmp_path} --use-checkpoint-opt-param-scheduler")
    assert_equal_logs([*first.log, *second.log], expected)


class Combined(NamedTuple):
    """A run beside other features: its ranks and flags, and what the first and the last of its ranks do."""

    ranks: int
    parallel: str
    model: str
    first: Load
    last: Load
    without: str = ""


def combined(ranks, parallel, model, load, last=None, without=""):
    return Combined(ranks, parallel, model, load, last or load, without)


STAGES = "--pipeline-model-parallel-size 2 --pp-schedule"


def stage(schedule, rank, grid, outputs):
    """Load of all iterations of 4 microbatches in 4 layers, of which a pipeline rank has two."""
    ran = [action.kind for cell in lower(build(schedule, 2, 4)).table[rank] for action in halves(cell)]
    apart = ran.count(WEIGHT) / (ran.count(WEIGHT) + ran.count(FULL))
    return Load(grid, micros=4 * ITERATIONS, apart=apart, outputs=outputs)


# a run has several features where they do not meet
COMBINED = {
    "fewer groups than ranks, norms of q and k, biases of q, k and v, full recompute": combined(
        4,
        f"{tensor(4, '2d')} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--num-query-groups 2 --qk-layernorm --adam-eps 1e-5 --add-qkv-bias",
        Load((2, 2), key_value=KEY_VALUE // 2, forwards=2),
    ),
    "biases of all linears, no gate, flux by collectives": combined(
        4,
        tensor(4, "flux --tp-engine collective"),
        "--squared-relu",
        Load((4, 1), first=FFN),
        without="--disable-bias-linear --swiglu",
    ),
    "shared experts, tied embeddings": combined(
        4,
        tensor(4, "2d"),
        "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0 --moe-token-dispatcher-type alltoall "
        "--moe-shared-expert-intermediate-size 96 --moe-ffn-hidden-size 96",
        Load((2, 2)),
        without="--untie-embeddings-and-output-weights",
    ),
    "2.5d beside context parallelism": combined(
        8,
        f"{tensor(4, '2.5d')} --context-parallel-size 2 --use-distributed-optimizer",
        "",
        Load((2, 2), tokens=SEQUENCE * BATCH // 2),
    ),
    "2.5d in panels beside data parallelism, overlapped": combined(
        4,
        f"{tensor(2, '2.5d --tp-grid 1 2 --tp-engine panels')} --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather",
        "",
        Load((1, 2), micros=ITERATIONS),
    ),
    "zb-h1, flux in place of transformer-engine's overlap, weight gradients in their turn": combined(
        4,
        f"--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap {STAGES} zb-h1",
        DEEP,
        stage("zb-h1", 0, (2, 1), outputs=0),
        stage("zb-h1", -1, (2, 1), outputs=1),
    ),
    "zb-h1, weights alone": combined(
        4,
        f"{tensor(2, '2d --tp-grid 1 2')} {STAGES} zb-h1",
        DEEP,
        stage("zb-h1", 0, (1, 2), outputs=0),
        stage("zb-h1", -1, (1, 2), outputs=1),
    ),
    # both ends of the model are on the first rank
    "zb-v": combined(
        4,
        f"{tensor(2, '2d --tp-grid 2 1')} {STAGES} zb-v",
        DEEP,
        stage("zb-v", 0, (2, 1), outputs=1),
        stage("zb-v", -1, (2, 1), outputs=0),
    ),
    # its processes make the groups of the grid too
    "a stage without layers": combined(
        4,
        f"{tensor(2, '2d --tp-grid 1 2')} --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*4|L "
        "--pp-schedule 1f1b",
        DEEP,
        Load((1, 2), layers=4, micros=4 * ITERATIONS, outputs=0),
        Load((1, 2), layers=0, micros=4 * ITERATIONS),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMBINED)
def test_combined_with_other_features_equals_one_rank(alone, case):
    asked = COMBINED[case]
    runs = run_ranks(asked.ranks, trained_with_linears, tiny(MODEL, asked.parallel, asked.model, without=asked.without))
    if asked.without:
        expected = run_ranks(1, trained_with_linears, tiny(MODEL, asked.model, without=asked.without))[0].log
    else:
        expected = alone(asked.model)
    for found, load in ((runs[0], asked.first), (runs[-1], asked.last)):
        assert_equal_logs(found.log, expected)
        assert found.linears == (PLACED if load.layers else set())
        assert found.output == "OutputLinear" * load.outputs
        assert found.sent == load.sent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "load"),
    [
        (tensor(4, "2d"), Load((2, 2))),
        (f"{tensor(2, '2d --tp-grid 1 2 --tp-engine panels')} {STAGES} zb-h1", stage("zb-h1", 0, (1, 2), outputs=0)),
    ],
    ids=["2d", "zb-h1 in panels"],
)
def test_frozen_weights_equal_one_rank_and_send_no_gradients(alone, parallel, load):
    frozen, model = ("linear_qkv", "linear_fc2"), DEEP if "zb" in parallel else ""
    expected = run_ranks(1, trained_with_linears, tiny(MODEL, model), frozen)[0].log
    assert expected[-1]["loss"] != alone(model)[-1]["loss"]
    found = run_ranks(4, trained_with_linears, tiny(MODEL, parallel, model), frozen)[0]
    assert_equal_runs(found, expected)
    assert found.sent == load._replace(frozen=frozen).sent


@pytest.mark.slow
def test_stages_of_megatrons_own_linears_equal_one_rank_under_a_split_schedule(alone):
    found = run_ranks(4, trained_with_linears, tiny(MODEL, f"{tensor(2, '1d')} {STAGES} zb-h1", DEEP))
    for each, output in ((found[0], ""), (found[-1], "ColumnParallelLinear")):
        assert (each.linears, each.sent, each.output) == (STOCK, 0, output)
        assert_equal_logs(each.log, alone(DEEP))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "parallel"),
    [(2, ""), (2, "--sequence-parallel --recompute-granularity selective")],
)
def test_megatrons_own_linears_equal_one_rank(alone, size, parallel):
    found, expected = run(size, f"--tensor-model-parallel-size {size} --tp-comm-type 1d {parallel}"), alone()
    assert (found.linears, found.sent) == (STOCK, 0)
    assert_equal_logs(found.log, expected)


def differences(found, expected, what):
    """Relative differences of losses or norms, iteration by iteration."""
    return [abs(step[what] / other[what] - 1) for step, other in zip(found, expected, strict=True)]


@pytest.fixture(scope="module")
def rounded():
    """Largest differences of bf16 norms that Megatron's own linears have on 2 and 4 ranks from one, and that one."""
    runs = [run(size, tensor(size, "1d"), BF16) for size in (2, 4)]
    assert all(not name.startswith("Grid") for found in runs for name in found.linears)
    expected = run(1, BF16).log
    return expected, max(max(differences(found.log, expected, "grad_norm")) for found in runs)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["flux", "2d"])
def test_bf16_differs_from_one_rank_by_no_more_than_megatrons_own_linears_do(rounded, scheme):
    expected, own = rounded
    found = run(4, tensor(4, scheme), BF16)
    assert found.linears == PLACED
    assert max(differences(found.log, expected, "loss")) < BF16_STEP
    # on the CPU of the first run: flux 5e-4, 2d 8e-4, Megatron's own 1.6e-3
    assert max(differences(found.log, expected, "grad_norm")) < max(BF16_STEP, own)


@pytest.mark.slow
def test_products_of_stream_k_under_the_interpreter_equal_one_rank(alone):
    pytest.importorskip("triton", reason="Stream-K is written in Triton, which comes with torch for CUDA")
    words = "--num-layers 1 --train-iters 1 --global-batch-size 2"
    flags = tiny(MODEL, tensor(2, "flux --tp-gemm stream-k"), words)
    found = run_ranks(2, interpreted, flags)[0]
    assert_equal_runs(found, alone(words))
    # forward, input and weight gradient of five linears in two pieces
    assert found.stream_k == 3 * 5 * 2


def interpreted(flags):
    import os

    os.environ["TRITON_INTERPRET"] = "1"
    return trained_with_linears(flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded", "optimizer"),
    [((4, "2d"), (1, "1d"), ""), ((2, "1d"), (4, "2d"), DISTRIBUTED)],
    ids=["2d to one rank", "1d to 2d, distributed"],
)
def test_a_checkpoint_moves_between_layouts(alone, tmp_path, saved, loaded, optimizer):
    (size, scheme), (other, others) = saved, loaded
    decay = "--lr-decay-iters 3"
    saving = f"--train-iters 2 --save {tmp_path} --save-interval 2"
    first = run(size, tensor(size, scheme), optimizer, decay, saving)
    loading = f"--load {tmp_path} --use-checkpoint-opt-param-scheduler"
    second = run(other, tensor(other, others) if other > 1 else "", optimizer, decay, loading)
    assert_equal_logs([*first.log, *second.log], alone())
