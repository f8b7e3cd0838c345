"""Command line -> config: every spelling that is promised, and one line for every mistake."""

import dataclasses

import pytest

from hvd import overrides
from hvd.configs import DataConfig, Experiment, KeyMap
from hvd.errors import UserError
from hvd.experiments import CONFIGS, get_config
from hvd.fields import leaves
from hvd.train import run_dir


def parse(text: str, config: str = "demo") -> Experiment:
    return overrides.experiment(["--config", config, *text.split()])


def test_a_home_folder_is_written_out(monkeypatch, tmp_path):
    """The shell does it for `--data ~/x`, and not for `--data=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = "--runs_dir=~/runs --optimal_data.root ~/a --value.weight_loader ~"
    cfg = parse(words)
    assert (cfg.runs_dir, cfg.optimal_data.root, cfg.value.weight_loader) == (
        f"{tmp_path}/runs", f"{tmp_path}/a", str(tmp_path),
    )  # fmt: skip
    assert parse("--exp_name a~b").exp_name == "a~b" and parse("--exp_name ~~").exp_name == "~~"


@pytest.mark.parametrize(
    "text, field, value",
    [
        ("--model.network_type q", "model.network_type", "q"),
        ("--model.network-type q", "model.network_type", "q"),
        ("--model.network-type=q", "model.network_type", "q"),
        ("--model.method expectile --model.method quantile", "model.method", "quantile"),
        ("--exp-name mine", "exp_name", "mine"),
        ("--value.batch_size 128", "value.batch_size", 128),
        ("--value.lr_schedule.peak_lr 1e-3", "value.lr_schedule.peak_lr", 1e-3),
        ("--evaluate.seed -1", "evaluate.seed", -1),
        ("--wandb", "wandb", True),
        ("--wandb true", "wandb", True),
        ("--wandb False", "wandb", False),
        ("--policy.no-augment-images", "policy.augment_images", False),
        ("--policy.no_augment_images", "policy.augment_images", False),
        ("--suboptimal_data.success_only true", "suboptimal_data.success_only", True),
        ("--model.cameras a b", "model.cameras", ("a", "b")),
        ("--model.cameras", "model.cameras", ()),
        ("--model.cameras []", "model.cameras", ()),
        ("--model.hierarchical_actions [[7,8,9],[0]]", "model.hierarchical_actions", ((7, 8, 9), (0,))),
        ("--optimal_data.keys.images a b c d", "optimal_data.keys.images", {"a": "b", "c": "d"}),
        ('--optimal_data.keys.images {"a":"b"}', "optimal_data.keys.images", {"a": "b"}),
        ("--optimal_data.keys.images {} --optimal_data.keys.images.a-b c", "optimal_data.keys.images", {"a-b": "c"}),
        ("--optimal_data.keys.state observation.state", "optimal_data.keys.state", ("observation.state",)),
    ],
)
def test_a_field_takes_the_value(text, field, value):
    found = parse(text)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_nothing_else_changes():
    changed = parse("--value.batch_size 128 --model.cameras []")
    before = get_config("demo")
    value = dataclasses.replace(before.value, batch_size=128)
    assert changed == dataclasses.replace(before, value=value).resolved()


@pytest.mark.parametrize(
    "text, line",
    [
        ("--value.batchsize 3", "unknown field --value.batchsize; nearest: --value.batch_size"),
        ("--batch_size 3", "unknown field --batch_size; nearest: --value.batch_size, --policy.batch_size"),
        ("--method q", "unknown field --method; nearest: --model.method"),
        ("--qqqq 3", "unknown field --qqqq; `--help` lists all options"),
        ("--value.batch_size abc", "--value.batch_size: 'abc' is not a whole number"),
        ("--seed 1.5", "--seed: '1.5' is not a whole number"),
        ("--value.gamma high --seed 3", "--value.gamma: 'high' is not a number"),
        ("--value.batch_size", "--value.batch_size: the value is missing; needs a whole number"),
        ("--value.batch_size 1 2", "--value.batch_size: '1 2' are 2 values; needs a whole number"),
        ("--norm.mode quantil", "--norm.mode: 'quantil' is not one of z_score, quantile; nearest: quantile"),
        ("--wandb maybe", "--wandb: 'maybe' is not true or false"),
        ("--no-wandb true", "--no-wandb takes no value, got 'true'"),
        ("--value 3", "--value is a group of fields, for example --value.num_train_steps"),
        ("--name other", "--name: the config's name is fixed; --exp_name names a run of it"),
        ("--model.hierarchical_actions [1]", "--model.hierarchical_actions[0]: 1 is not a list of whole numbers"),
        ("--model.hierarchical_actions [[1]", "--model.hierarchical_actions: '[[1]' is not JSON"),
        ("--optimal_data.keys.images a", "--optimal_data.keys.images: 'a' is not pairs"),
        ("--model.hierarchical_actions 7 8", "--model.hierarchical_actions: '7 8' is not a JSON list of lists"),
        ("--config-file x.yaml", "--config and --config-file contradict each other"),
        ("--data somewhere", "--data: config demo simulates its own data"),
        ("--config", "--config: the value is missing"),
        ("--config nonesuch", "unknown config 'nonesuch'; known: demo, g1"),
        ("--config dem", "unknown config 'dem'; nearest: demo"),
    ],
)
def test_a_mistake_is_one_line(text, line):
    with pytest.raises(UserError) as error:
        parse(text)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_value_without_an_option_is_named():
    with pytest.raises(UserError, match="'demo' stands alone"):
        overrides.experiment(["demo"])


def test_config_is_required_without_a_default():
    with pytest.raises(UserError, match="--config NAME is missing"):
        overrides.experiment([])
    assert overrides.experiment([], "demo").name == "demo"


@dataclasses.dataclass(frozen=True)
class Sets:
    more_data: dict[str, DataConfig]


def test_a_dotted_name_goes_on_into_a_mapping():
    before = Sets({"day-1": DataConfig("a")})
    flags = "--more_data.day-1.max-episodes 3 --more_data.day2.repo_id b --more_data.day2.keys.state x y"
    found = overrides.apply(before, overrides.split_flags(flags.split()))
    day2 = DataConfig("b", keys=KeyMap(state=("x", "y")))
    assert found == Sets({"day-1": DataConfig("a", max_episodes=3), "day2": day2})
    with pytest.raises(UserError, match=r"^unknown field --more_data.day2.repoid; nearest: --more_data.day2.repo_id"):
        overrides.apply(before, overrides.split_flags(["--more_data.day2.repoid", "x"]))


def test_a_config_file_is_that_of_a_run_or_a_tree_of_fields(tmp_path):
    cfg = parse("--exp_name mine --value.batch_size 128")
    run_dir.write_config(tmp_path, cfg, "value", {})
    (tmp_path / "tree.yaml").write_text("name: mine\nvalue: {batch_size: 128}\n")
    given = ["--config-file", str(tmp_path / "config.yaml")]
    assert overrides.experiment(given) == cfg
    assert overrides.experiment([*given, "--seed", "3"]) == dataclasses.replace(cfg, seed=3)
    assert overrides.experiment(["--config-file", str(tmp_path / "tree.yaml")]).value.batch_size == 128


@pytest.mark.parametrize(
    "text, line",
    [
        (None, "No such file"),
        ("a: [", "while parsing a flow"),
        ("3", "3 is not a group of fields"),
        ("name: x\nvalue: {batchsize: 3}", "value: unknown field 'batchsize'; nearest: batch_size"),
        ("config: {name: x, seed: a}", "seed: 'a' is not a whole number"),
        ("seed: 3", "field 'name' is missing"),
    ],
)
def test_a_config_file_with_a_mistake_is_named(tmp_path, text, line):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml: ") as error:
        overrides.experiment(["--config-file", str(path)])
    assert line in str(error.value) and "\n" not in str(error.value)


def dataset(folder):
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text("{}")
    return folder


def test_data_is_a_dataset_or_the_folder_above(tmp_path):
    here = dataset(tmp_path / "g1_bottle")
    for given in (here, tmp_path):
        cfg = parse(f"--data {given}", "g1")
        assert (cfg.optimal_data.root, cfg.suboptimal_data.root) == (str(here), str(here))
    cfg = parse(f"--data {here} --suboptimal_data.root elsewhere", "g1")
    assert (cfg.optimal_data.root, cfg.suboptimal_data.root) == (str(here), "elsewhere")


def test_data_without_a_dataset_names_the_folder(tmp_path):
    with pytest.raises(UserError, match="no LeRobot dataset there"):
        parse(f"--data {tmp_path}", "g1")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_field_of_every_config_can_be_set_to_what_it_is(name):
    """Round trip through the command line: no field has a type that the command line cannot take."""
    cfg = get_config(name)
    args = []
    for field, leaf in leaves(Experiment).items():
        value, kind = leaf.of(cfg), leaf.kind
        if field == "name" or (not value and kind is not bool and not isinstance(value, int | float)):
            continue
        flag = "--" + field
        match value:
            case dict():
                args += [flag, *(str(word) for pair in value.items() for word in pair)]
            case tuple():
                args += [flag, str([list(v) if isinstance(v, tuple) else v for v in value]).replace("'", '"')]
            case _:
                args += [flag, str(value)]
    assert overrides.experiment(["--config", name, *args]) == cfg.resolved()
