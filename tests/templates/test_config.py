"""Section 16: settings from defaults, a file and the command line."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import pytest
import yaml

from templates.config import (
    ConfigError,
    TrainingConfig,
    build_config,
    continue_run,
    convert_setting,
    describe_fields,
    parse_config,
    read_config_file,
    start_run,
)


@dataclass
class Settings:
    """One field of each kind that a config may have."""

    epochs: Annotated[int, (1, None)] = 3  # passes over the data
    rate: Annotated[float, (1e-9, 1)] = 1e-3  # 100% of the %(default)s
    dtype: Literal["auto", "fp16", "bf16"] = "auto"  # of the matrix products
    ways: Literal[1, 2] = 1
    workers: Annotated[int, (0, None)] | None = None  # none: what suits
    colour: str = "#fff"  # of the curve, see issue #3
    resume: bool = False  # go on
    shuffle: bool = True


@dataclass
class SeedConfig:
    """The guide's pattern, as far as it matters here."""

    batch_size: int = 32
    learning_rate: float = 2e-5

    @classmethod
    def load(cls, path):
        with open(path) as file:
            return cls(**yaml.safe_load(file))


def parse(*words: str) -> Settings:
    return parse_config(Settings, list(words))


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    return str(caught.value)


# --- Files ---------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["2e-5", "1e3", "1E-4", "2.0e5", "3", '"0.5"'])
def test_every_spelling_of_a_number_in_yaml_is_a_number(spelling, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"learning_rate: {spelling}\n")
    loaded = TrainingConfig.load(str(path)).learning_rate
    assert type(loaded) is float
    assert loaded == float(spelling.strip('"'))


def test_the_seeds_pattern_leaves_2e_5_a_string(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 2e-5\nbatch_size: no\n")
    assert SeedConfig.load(path).learning_rate == "2e-5"
    assert SeedConfig.load(path).batch_size is False
    with pytest.raises(ConfigError, match="batch_size is False"):
        TrainingConfig.load(str(path))


def test_all_problems_of_a_file_are_named_at_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rat: 1\nbatch_size: 1.5\nuse_amp: 1\nmodel_name: 7\n3: x\n"
        "seed: .nan\nmax_grad_norm: .inf\nnum_epochs: [1]\nhidden_size: null\n"
    )
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.load(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for part in (
        "'learning_rat': did you mean learning_rate?",
        "batch_size is 1.5 (float), expected a whole number",
        "use_amp is 1 (int), expected true or false",
        "model_name is 7 (int), expected a text",
        "unknown setting 3",
        "seed is nan",
        "max_grad_norm is inf (float), expected a finite number",
        "num_epochs is [1]",
        "hidden_size is None",
    ):
        assert part in message


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_round_trip(suffix, tmp_path):
    config = TrainingConfig(
        model_name="a: #b 한글", learning_rate=3e-7, use_amp=False, seed=2**63 + 1
    )
    path = tmp_path / f"run.{suffix}"
    config.save(path)
    assert TrainingConfig.load(path) == config
    assert TrainingConfig.load(str(path)) == config


def test_json_needs_no_pyyaml_and_yaml_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text('{"seed": 7}')
    (tmp_path / "run.yaml").write_text("seed: 7")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert TrainingConfig.load(str(tmp_path / "run.json")).seed == 7
    with pytest.raises(ConfigError, match="pip install pyyaml"):
        TrainingConfig.load(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.yaml", None, "cannot be read"),
        ("bad.yaml", b"a: [1", "cannot be parsed"),
        ("date.yaml", b"a: 2024-13-45", "cannot be parsed"),
        ("bytes.yaml", b"a: \xff", "cannot be parsed"),
        ("bad.json", b"{", "cannot be parsed"),
        ("list.yaml", b"- 1", "holds a list"),
        ("text.json", b'"a"', "holds a str"),
    ],
)
def test_a_file_that_cannot_be_used(name, content, reason, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config_file(str(path))
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert parse("--config", str(tmp_path / "run.yaml")) == Settings()


def test_no_code_runs_from_a_file(tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "run.yaml").write_text(
        f"seed: !!python/object/apply:os.mkdir ['{trap}']\n"
    )
    with pytest.raises(ConfigError, match="cannot be parsed"):
        TrainingConfig.load(str(tmp_path / "run.yaml"))
    assert not trap.exists()


# --- Types ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted", "result"),
    [
        ("1e3", int, 1000),
        (64.0, int, 64),
        (str(2**62 + 1), int, 2**62 + 1),  # a float would lose the last bit
        (3, float, 3.0),
        (2**53 + 1, float, float(2**53)),
        ("True", bool, True),
        ("none", int | None, None),
        (None, str | None, None),
        ("4", int | None, 4),
        ("4", Annotated[int, (1, 4)], 4),
        (None, Annotated[int | None, (1, 4)], None),
        ("4", Annotated[int, (1, 4)] | None, 4),
        ("2", Literal[1, 2], 2),
        ("", str, ""),
    ],
)
def test_conversions(value, wanted, result):
    converted = convert_setting(value, wanted)
    assert converted == result
    assert type(converted) is type(result)


@pytest.mark.parametrize(
    ("value", "wanted", "reason"),
    [
        (True, int, "a whole number"),
        ("", int, "a whole number"),
        ("1.5", int, "a whole number"),
        ("1e400", float, "a finite number"),
        pytest.param(10**400, float, "a finite number", id="huge"),
        (0, Annotated[int, (1, None)], "at least 1"),
        ("1.1", Annotated[float, (0, 1)], "at most 1"),
        (0, Annotated[int, (1, None)] | None, "at least 1"),
        ("fp8", Literal["fp16", "bf16"], "one of fp16, bf16"),
        ([], Literal["fp16"], "one of fp16"),
        ("yes", bool, "true or false"),
        (None, str, "a text"),
        ([1], list[int], "list"),
    ],
)
def test_what_does_not_fit_is_refused(value, wanted, reason):
    with pytest.raises(ValueError, match=reason):
        convert_setting(value, wanted)


def test_a_field_without_a_default_must_come_from_somewhere(tmp_path):
    @dataclass
    class Required:
        data: str
        seed: int = 1

    with pytest.raises(ConfigError, match="data is missing and has no default"):
        build_config(Required, {}, source="run.yaml")
    (tmp_path / "run.yaml").write_text("seed: 2\n")
    words = ["--config", str(tmp_path / "run.yaml"), "--data", "a.csv"]
    assert parse_config(Required, words) == Required("a.csv", 2)


# --- Command line --------------------------------------------------------------------


def test_command_line_over_file_over_default(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 5\nrate: 1e-2\nshuffle: false\n")
    config = parse("--config", str(path), "--epochs=7", "--no-resume", "--workers=2")
    assert config == Settings(epochs=7, rate=1e-2, workers=2, shuffle=False)
    path.write_text("workers: 4\nresume: true\n")
    config = parse("--config", str(path), "--workers", "none", "--no-shuffle")
    assert config == Settings(resume=True, shuffle=False)
    assert parse() == Settings()


def test_all_problems_of_the_command_line_are_named_at_once():
    message = refusal("--epoch=2", "--epochs", "0", "--dtype=fp8", "--colur", "red")
    for part in (
        "unknown option --epoch: did you mean --epochs?",
        "unknown option --colur: did you mean --colour?",
        "epochs is '0' (str), expected at least 1",
        "dtype is 'fp8' (str), expected one of auto, fp16, bf16",
    ):
        assert part in message
    assert "red" not in message


@pytest.mark.parametrize("words", [["--epochs"], ["--resume=1"], ["stray.csv"]])
def test_misuse_is_an_error_of_ours_that_names_the_word(words):
    message = refusal(*words)
    assert words[0].partition("=")[0] in message
    assert "--help" in message


def test_abbreviations_are_not_guessed():
    assert "did you mean --epochs?" in refusal("--epoc=4")


def test_help_shows_the_comments_the_choices_and_the_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        parse_config(Settings, ["--help"], description="Keeps\n  its lines; 5% more.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "Keeps\n  its lines; 5% more.",
        "passes over the data (default: 3)",
        "100% of the %(default)s (default: 0.001)",
        "--dtype {auto,fp16,bf16}",
        "of the curve, see issue #3 (default: #fff)",
        "--resume, --no-resume",
        "(default: True)",
        "--config FILE",
    ):
        assert part in text
    assert "SUPPRESS" not in text


def test_a_class_without_source_has_no_comments():
    made = type("Made", (), {"__annotations__": {"seed": int}, "__module__": "none"})
    assert describe_fields(made) == {}


# --- Folders of runs -----------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
def test_start_run_numbers_the_folders_and_overwrites_nothing(slash, tmp_path):
    wanted = f"{tmp_path}/runs/text{slash}"
    folders = [start_run(Settings(epochs=n), wanted) for n in (1, 2, 3)]
    names = ["text", "text-2", "text-3"]
    assert folders == [tmp_path / "runs" / name for name in names]
    for number, folder in enumerate(folders, 1):
        loaded = parse("--config", str(folder / "config.json"))
        assert loaded == Settings(epochs=number)
        assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_continue_run_takes_the_same_settings_and_refuses_others(tmp_path):
    out_dir = str(tmp_path / "run")
    first = Settings(rate=1 / 3)
    assert continue_run(first, out_dir, may_change=("workers",)) == tmp_path / "run"
    changed = Settings(rate=1 / 3, workers=2)
    assert continue_run(changed, out_dir, may_change=("workers",)) == tmp_path / "run"
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert kept == asdict(changed)
    with pytest.raises(ConfigError) as caught:
        continue_run(Settings(rate=0.5, epochs=4), out_dir, may_change=("workers",))
    message = str(caught.value)
    assert "epochs was 3 and is 4" in message
    assert f"rate was {1 / 3} and is 0.5" in message
    assert "workers" not in message
    assert json.loads((tmp_path / "run/config.json").read_text()) == kept


def test_continue_run_warns_of_another_machine_and_goes_on(tmp_path, capsys):
    facts = {"samples": 3, "machine": "cuda:0: H100, torch 2.13"}
    for _ in range(2):
        continue_run(Settings(), str(tmp_path), facts)
    assert capsys.readouterr().out == ""
    facts["machine"] = "cuda:0: A100, torch 2.13"
    continue_run(Settings(), str(tmp_path), facts)
    assert "this run was on cuda:0: H100, torch 2.13" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="samples was 3 and is 4"):
        continue_run(Settings(), str(tmp_path), {**facts, "samples": 4})


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for begin in (start_run, lambda *words: continue_run(*words)):
        with pytest.raises(ConfigError, match=r"config\.json: cannot be written"):
            begin(Settings(), f"{tmp_path}/file/run")
