"""hvd plan: the compiler's own figures, categories that add up, verdicts, advice, the command."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest

from hvd import overrides
from hvd.errors import EXIT_COMPLETE, EXIT_USER, Failed, UserError
from hvd.method import policy
from hvd.plan import advice as plan_advice
from hvd.plan import command as plan
from hvd.plan import devices as plan_devices
from hvd.plan import measure as plan_measure
from hvd.plan import report as plan_report
from hvd.plan.measure import Measurer
from hvd.plan.request import Measurement, Request
from hvd.plan.verdict import Verdict
from hvd.train import loop, mesh, stage_data, state

pytestmark = pytest.mark.optimised

GIB = 1 << 30
# numbers only, two layers of work less than the demo's own models: compiles in seconds
TINY = ["--config", "demo", "--model.paligemma_variant", "tiny_trunk", "--policy.batch_size", "8"]


def request(argv=TINY, **changes) -> Request:
    fields = {"argv": list(argv), "stage": "policy", "device": "rtx4090-24gb", "per_node": 1, "nodes": 1}
    return Request(**fields | {"compiler": "cpu", "limit": 24 * GIB} | changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def one_device(cache) -> Measurement:
    return Measurer(cache)(request())


@pytest.fixture(scope="module")
def four_devices(cache) -> Measurement:
    return Measurer(cache)(request([*TINY, "--fsdp_devices", "2"], per_node=2, nodes=2))


def test_the_figures_are_those_of_the_trainers_own_step(one_device):
    cfg = overrides.experiment(TINY)
    devices = mesh.make_devices(1, jax.devices()[:1])
    program = policy.make_program(cfg, devices, 21)
    like = state.abstract(program.init, devices)
    step = loop.jitted_step(program, cfg.policy, devices, like)
    batch = stage_data.abstract_batch(cfg, "policy", devices)
    flags = jax.ShapeDtypeStruct((1,), "int32", sharding=devices.batch)
    memory = step.lower(like, batch, flags).compile().memory_analysis()
    assert one_device.argument == memory.argument_size_in_bytes
    assert one_device.temp == memory.temp_size_in_bytes
    assert one_device.output == memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert one_device.peak == one_device.argument + one_device.temp + one_device.output
    assert sum(one_device.state.values()) == state.num_bytes(like)["state_bytes_per_device"]
    assert one_device.state["EMA"] == one_device.state["parameters, trained"] == one_device.gradients


@pytest.mark.parametrize("which", ["one_device", pytest.param("four_devices", marks=pytest.mark.slow)])
def test_the_categories_add_up_to_the_compilers_peak(which, request):
    found = request.getfixturevalue(which)
    parts = found.categories()
    assert sum(parts.values()) == found.peak > 0
    assert all(size >= 0 for size in parts.values()), parts
    for name in ("parameters, trained", "optimiser", "EMA", "batch", "gradients", "temporaries"):
        assert parts[name] > 0, name
    # with two rows a device the fullest moment is that of the gradients' exchange, when no activation is left
    assert (parts["activations"] > 0) == (which == "one_device")
    assert found.flops and found.seconds > 0 and found.rss > 0
    sizes = [size for size, *_ in found.largest]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= found.temp


@pytest.mark.slow
def test_more_devices_need_less_each(one_device, four_devices):
    assert four_devices.batch * 4 == one_device.batch
    assert four_devices.temp < one_device.temp
    assert four_devices.flops == one_device.flops, "of the whole batch, whoever computes it"


def test_an_answer_is_kept_and_another_question_is_not_mixed_up_with_it(cache, one_device, monkeypatch):
    def never(self, request):
        raise AssertionError("it was measured again")

    monkeypatch.setattr(Measurer, "_run", never)
    assert Measurer(cache)(request()) == one_device
    assert Measurer(cache)(request([*TINY, "--exp_name", "other", "--runs_dir", "elsewhere"])) == one_device
    for other in (request([*TINY, "--policy.remat", "full"]), request(device="h100-80gb"), request(stage="value")):
        with pytest.raises(AssertionError, match="measured again"):
            Measurer(cache)(other)


def test_a_state_that_cannot_fit_is_not_compiled(tmp_path):
    found = Measurer(tmp_path)(request(limit=1 << 20))
    assert not found.compiled and found.least > 1 << 20 and found.state["optimiser"] > 0


def test_mistakes_and_failures_of_the_compiling_process(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"value.batch_size 64 is not divisible by the 3 devices"):
        plan.main([*TINY, "--devices", "3xh100-80gb", "--no-cache"])

    def answers(code: str):
        monkeypatch.setattr(plan_measure, "COMMAND", (sys.executable, "-c", "import sys; sys.stdin.read(); " + code))

    answers("print('error: gemma experts must share depth', file=sys.stderr); sys.exit(2)")
    with pytest.raises(UserError, match=r"^gemma experts must share depth$"):
        Measurer(tmp_path)(request())
    answers("sys.exit('XlaRuntimeError: INTERNAL')")
    with pytest.raises(Failed, match="could not be compiled: XlaRuntimeError"):
        Measurer(tmp_path)(request())
    answers("import time; time.sleep(60)")
    monkeypatch.setattr(plan_measure, "_TELL_EVERY", 0.05)
    told: list[str] = []
    with pytest.raises(Failed, match="longer than 0 s"):
        Measurer(tmp_path, seconds=0.2, say=told.append)(request())
    assert told and list(tmp_path.iterdir()) == []


# --- verdicts and advice, with figures made up


def measurement(argv, cluster, compiler="cuda") -> Measurement:
    """A model of 40 GiB of state and 8 GiB of activations a row."""
    cfg = overrides.experiment(argv)
    own, parts = cfg.policy, cfg.fsdp_devices or cluster.per_node
    lora = "lora" in cfg.model.paligemma_variant
    each = (8 if lora else 32) * GIB // parts
    rows = own.batch_size // cluster.count // own.grad_accum_steps
    per_row = {"none": 8, "dots": 2, "full": 1}[own.remat] * GIB
    sizes = {"parameters, trained": each // 4, "optimiser": each // 2}
    return Measurement(
        compiler=compiler,
        state=sizes,
        batch=1 << 20,
        gradients=each // 4,
        state_total=3 * each * parts // 4,
        parameters=1,
        trained=1,
        peak=each + rows * per_row,
        argument=sum(sizes.values()) + (1 << 20),
        temp=each // 4 + rows * per_row - (1 << 20),
    )


def judged(argv, devices, nodes=1, compiler="cuda", asked: list | None = None):
    def judge(flags, cluster):
        if asked is not None:
            asked.append((" ".join(flags), cluster.name, cluster.per_node))
        full = [*argv, *flags]
        return Verdict(
            overrides.experiment(full), "policy", cluster, cluster.limit(0.92), measurement(full, cluster, compiler)
        )

    return judge, judge([], plan_devices.parse(devices, nodes))


BIG = ["--config", "pi0_r1", "--policy.remat", "none", "--fsdp_devices", "1"]


@pytest.mark.parametrize(
    "devices, flags, advice",
    [
        ("8xh100-80gb", (), "fits"),
        # 16 rows a device: 32 + 128 GiB; parameters over the node alone do nothing on one device
        ("1xh100-80gb", (), "--policy.remat dots"),
        ("8xa100-40gb", (), "--fsdp_devices 0"),
        ("8xrtx4090-24gb", (), "--fsdp_devices 0"),
        ("2xa100-40gb", (), "--fsdp_devices 0 --policy.remat dots"),
        ("2xrtx4090-24gb", (), "--fsdp_devices 0 --policy.remat full --policy.grad_accum_steps 2"),
        (
            "1xrtx4090-24gb",
            (),
            "--policy.remat full --policy.grad_accum_steps 2 --model.paligemma_variant gemma_2b_lora "
            "--model.action_expert_variant gemma_300m_lora --policy.ema_decay 0",
        ),
    ],
)
def test_advice_is_the_first_that_fits(devices, flags, advice):
    judge, base = judged([*BIG, *flags], devices)
    if advice == "fits":
        assert base.fits
        return
    assert base.fits is False
    found = plan_advice.search(base, judge)
    assert found is not None
    change, better = found
    assert better.fits and better.needed <= better.limit
    assert change.text(base.cluster) == advice


def test_where_only_other_devices_help():
    lora = ["--config", "pi0_r1_lora", "--fsdp_devices", "1", "--policy.batch_size", "24", "--value.batch_size", "24"]
    judge, base = judged(lora, "1xrtx4090-24gb")
    found = plan_advice.search(base, judge)
    assert found is not None
    assert found[0].text(base.cluster) in (
        "--policy.grad_accum_steps 2",
        "--policy.grad_accum_steps 4",
    ), "24 rows in micro-batches"
    # a state that no setting makes small enough
    judge, base = judged(["--config", "pi0_r1_lora", "--fsdp_devices", "1"], "1xrtx4090-24gb")
    base = dataclasses.replace(base, limit=4 * GIB)
    asked: list = []
    judge, _ = judged(["--config", "pi0_r1_lora", "--fsdp_devices", "1"], "1xrtx4090-24gb", asked=asked)
    found = plan_advice.search(base, judge)
    assert found is not None
    assert "accum" not in found[0].text(base.cluster), "the state alone is too large: micro-batches are not even tried"


def test_few_questions_are_asked():
    asked: list = []
    judge, base = judged(BIG, "2xrtx4090-24gb", asked=asked)
    plan_advice.search(base, judge)
    assert len(asked) <= 5, asked


def test_the_cpus_compiler_gives_no_refusal_but_of_the_state():
    _, base = judged(BIG, "1xh100-80gb", compiler="cpu")
    assert base.needed > base.limit > base.least and base.fits is None
    assert "may fit: it needs between 32.0" in plan_report.conclusion(base)
    _, base = judged(BIG, "1xrtx4090-24gb", compiler="cpu")
    assert base.fits is False and "state, gradients and batch alone need 32.01 GiB" in plan_report.conclusion(base)
    _, base = judged(BIG, "8xh100-80gb", compiler="cpu")
    assert base.fits, "an upper bound that fits, fits"


def test_host_memory_and_time():
    _, base = judged([*BIG, "--fsdp_devices", "16"], "8xh100-80gb", nodes=2)
    assert base.host == base.measured.state_total // 2, "half of it on each node"
    assert base.step_seconds(0.4) is None
    counted = dataclasses.replace(base, measured=dataclasses.replace(base.measured, flops=16 * 989.4e12))
    assert counted.step_seconds(1.0) == pytest.approx(1.0) and counted.step_seconds(0.4) == pytest.approx(2.5)
    assert "at best 1,000 ms" in plan_report.text(counted, None)


# --- the command


def command(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "hvd.cli", "plan", *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


@pytest.mark.slow
def test_the_command_prints_the_table(cache, four_devices):
    kept = os.path.dirname(cache)
    args = [*TINY, "--fsdp_devices", "2", "--devices", "2xrtx4090-24gb", "--nodes", "2", "--stage", "policy"]
    os.makedirs(os.path.join(kept, "hvd"), exist_ok=True)
    link = os.path.join(kept, "hvd", "plans")
    if not os.path.exists(link):
        os.symlink(cache, link)
    done = command(*args, "--compiler", "cpu", XDG_CACHE_HOME=kept)
    assert done.returncode == EXIT_COMPLETE, done.stderr
    assert (
        "policy stage of demo on 2 nodes of 2 x rtx4090-24gb: mesh data 2 x fsdp 2, batch 8 (2 a device" in done.stdout
    )
    assert f"  {'peak':<24}{plan_report.size_text(four_devices.peak):>12}   by" in done.stdout
    assert "\nfits: " in done.stdout and "Traceback" not in done.stderr
    again = command(*args, "--compiler", "cpu", "--json", XDG_CACHE_HOME=kept)
    (found,) = json.loads(again.stdout)["plans"]
    assert found["fits"] is True and found["measured"]["peak"] == four_devices.peak
    assert sum(found["categories"].values()) == four_devices.peak


@pytest.mark.parametrize(
    "args, line",
    [
        (["--config", "demo"], "error: --devices is missing"),
        (["--config", "demo", "--devices", "8xh10"], "error: unknown device 'h10'; nearest: h100-80gb"),
        (["--config", "dmo", "--devices", "8xh100-80gb"], "error: unknown config 'dmo'; nearest: demo"),
        (["--config", "demo", "--devices", "8xh100-80gb", "--reserv", "2"], "error: unknown field --reserv"),
        (["--config", "demo", "--devices", "7xh100-80gb"], "error: value.batch_size 64"),
        (["--config", "demo", "--devices", "8xh100-80gb", "--stage", "bc"], "error: --stage: 'bc' is not one of"),
    ],
)
def test_mistakes_are_one_line(args, line):
    done = command(*args)
    assert done.returncode == EXIT_USER and done.stdout == ""
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1, done.stderr


def test_help_names_every_option_and_device():
    done = command("--help")
    assert done.returncode == EXIT_COMPLETE
    for field in dataclasses.fields(plan.Options):
        assert f"--{field.name}" in done.stdout
    assert "h200-141gb" in done.stdout


@pytest.mark.slow
def test_what_cannot_fit_is_refused_and_the_advice_really_fits(tmp_path):
    # all but 10 MiB of the device is reserved; the state needs 13
    args = [*TINY, "--stage", "policy", "--compiler", "cpu", "--reserve", f"{23.64 - 10 / 1024}"]
    done = command(*args, "--devices", "2xrtx4090-24gb", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == EXIT_USER, done.stderr
    assert "does not fit: state, gradients and batch alone need" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("it fits with: ")]
    advice = line.removeprefix("it fits with: ").partition("   (")[0].split()
    assert advice, line
    again = command(*args, *advice, XDG_CACHE_HOME=str(tmp_path))
    assert again.returncode == EXIT_COMPLETE and "\nfits: " in again.stdout, again.stdout + again.stderr


@pytest.mark.skipif(not plan_measure.has_cuda_compiler(), reason="no CUDA compiler: jax's CUDA plugin is not installed")
def test_the_gpus_compiler_works_without_a_gpu(tmp_path):
    argv = [*TINY, "--fsdp_devices", "2", "--model.dtype", "bfloat16"]
    found = Measurer(tmp_path)(request(argv, per_node=2, nodes=2, compiler="cuda"))
    parts = found.categories()
    assert sum(parts.values()) == found.peak > sum(found.state.values())
    assert parts["gradients"] > 0 and parts["temporaries"] > 0
