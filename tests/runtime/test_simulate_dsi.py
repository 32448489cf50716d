"""`simulate dsi` and its heat maps: what is printed, written and refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from flowspec.bench import heatmap
from flowspec.cli import main
from flowspec.errors import UserError
from flowspec.estimates import Acceptance, Latency, to_line
from flowspec.sim.dsi import Estimate, dsi_token, si_token

PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = {f"{name}.png" for name in (*heatmap.RATIOS, *heatmap.LOOKAHEADS)}


def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def small() -> heatmap.Sweep:
    return heatmap.sweep(4, servers=3, tokens=50, repeats=3, seed=7)


# ---- the table -----------------------------------------------------------------------------------
def test_the_table_and_the_json_lines_say_the_same_and_that_it_is_simulated(tmp_path, capsys):
    file = tmp_path / "dsi.jsonl"
    words = "--target-latency 20 --drafter-latency 2 --acceptance 1 --tokens 21 --lookahead 4"
    assert main(["simulate", "dsi", *words.split(), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    alone, si, dsi = (json.loads(line) for line in file.read_text().splitlines())
    assert [row["mean"] for row in (alone, si, dsi)] == pytest.approx([420, 132, 60])
    assert [row["lookahead"] for row in (alone, si, dsi)] == [None, 4, 4]
    assert [row["servers"] for row in (alone, si, dsi)] == [1, 1, 3]
    assert all(row["simulated"] and row["error"] == 0 for row in (alone, si, dsi))
    assert all(row["asked"]["servers"] == 7 and row["asked"]["tokens"] == 21 for row in (si, dsi))
    assert "simulated" in out and "7.00x" in out and "2.20x" in out  # 420 / 60, 132 / 60


def test_each_method_takes_its_best_lookahead_and_the_servers_limit_dsi_alone(tmp_path):
    """The first row of the paper's table: 1.31x is left of its 1.92x."""
    file = tmp_path / "dsi.jsonl"
    words = [
        "--target-latency",
        "20.6",
        "--drafter-latency",
        "6.8",
        "--acceptance",
        "0.93",
        "--repeats",
        "400",
    ]
    for servers, lookaheads in ((7, [6, 1]), (1, [6, 4])):
        assert (
            main(["simulate", "dsi", *words, "--servers", str(servers), "--json", str(file)]) == 0
        )
        _, si, dsi = (json.loads(line) for line in file.read_text().splitlines())
        assert [si["lookahead"], dsi["lookahead"]] == lookaheads
        assert dsi["servers"] <= servers
        if servers == 7:
            assert si["mean"] / dsi["mean"] == pytest.approx(1.31, abs=0.02)


def test_the_methods_may_be_given_lookaheads_of_their_own(tmp_path):
    for asked, lookaheads in (("1,5", [1, 5]), ("25,auto", [25, 2]), ("auto,3", [10, 3])):
        file = tmp_path / "dsi.jsonl"
        assert main(["simulate", "dsi", "--lookahead", asked, "--json", str(file)]) == 0
        assert [json.loads(line)["lookahead"] for line in file.read_text().splitlines()][1:] == (
            lookaheads
        )


def test_first_latencies_and_the_seed_are_heeded(tmp_path):
    def means(*words: str) -> list[float]:
        file = tmp_path / "dsi.jsonl"
        assert main(["simulate", "dsi", *words, "--json", str(file)]) == 0
        return [json.loads(line)["mean"] for line in file.read_text().splitlines()]

    first, same, other = means(), means("--seed", "1"), means("--seed", "2")
    assert first == same and first[1:] != other[1:]
    late = means("--first-target-latency", "51", "--acceptance", "0")
    assert late == pytest.approx([1050, 1149.9, 1050])
    late = means("--first-drafter-latency", "2.1", "--acceptance", "1", "--lookahead", "2")
    assert late == pytest.approx([1000, 66.6 + 334 + 2, 99.9 + 1 + 2])


def test_one_text_has_no_standard_error(tmp_path, capsys):
    file = tmp_path / "dsi.jsonl"
    assert main(["simulate", "dsi", "--repeats", "1", "--json", str(file)]) == 0
    assert [json.loads(line)["error"] for line in file.read_text().splitlines()] == [0, None, None]
    assert "nan" not in capsys.readouterr().out


# ---- estimates -----------------------------------------------------------------------------------
def acceptance(rule: str, temperature: float, value: float) -> str:
    return to_line(
        Acceptance(
            target="big",
            draft="little",
            dtype="float32",
            rule=rule,
            temperature=temperature,
            seed=0,
            max_new_tokens=9,
            prompts=3,
            acceptance=value,
            low=0.0,
            high=1.0,
            worth=9.0,
            accepted=9.0,
            rejected=9.0,
        )
    )


def latency(target: tuple[float, float] = (50.0, 20.0), draft=(5.0, 2.0)) -> str:
    ranges = {
        f"{name}_range_ms": (1.0, 99.0)
        for name in ("target_first", "target", "draft_first", "draft")
    }
    return to_line(
        Latency(
            target="big",
            draft="little",
            dtype="float32",
            threads=1,
            prompts=3,
            prompt_tokens=9.0,
            max_new_tokens=9,
            repeats=1,
            target_first_ms=target[0],
            target_ms=target[1],
            draft_first_ms=draft[0],
            draft_ms=draft[1],
            **ranges,
        )
    )


RATES = [
    acceptance("greedy", 0.0, 0.9),
    acceptance("coupled", 0.8, 0.7),
    acceptance("classic", 0.8, 0.75),
    acceptance("coupled", 1.0, 0.6),
]
TAKEN = (
    "acceptance",
    "target_latency",
    "first_target_latency",
    "drafter_latency",
    "first_drafter_latency",
)


@pytest.fixture
def estimates(tmp_path, monkeypatch):
    """Files of estimates in the folder in which the command runs."""
    monkeypatch.chdir(tmp_path)
    for name, lines in (
        ("pair", RATES),
        ("one", RATES[1:2]),
        ("times", [latency()]),
        ("both", [*RATES, latency()]),
        ("twice", [latency(), latency()]),
        ("mean", RATES[1:3]),
        ("slow", [RATES[0], latency(draft=(30.0, 30.0))]),
        ("early", [RATES[0], latency(target=(10.0, 20.0))]),
    ):
        (tmp_path / f"{name}.json").write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    "words,taken",
    [
        ("--estimates both.json", (0.9, 20, 50, 2, 5)),
        ("--estimates pair.json times.json", (0.9, 20, 50, 2, 5)),
        ("--estimates one.json times.json", (0.7, 20, 50, 2, 5)),
        ("--estimates both.json --temperature 0", (0.9, 20, 50, 2, 5)),
        ("--estimates both.json --temperature 1", (0.6, 20, 50, 2, 5)),
        ("--estimates both.json --temperature 0.8 --rule classic", (0.75, 20, 50, 2, 5)),
        ("--estimates both.json --rule classic", (0.75, 20, 50, 2, 5)),
        ("--estimates both.json --acceptance 0.5", (0.5, 20, 50, 2, 5)),
        ("--estimates both.json --target-latency 40", (0.9, 40, None, 2, 5)),
        ("--estimates both.json --drafter-latency 4", (0.9, 20, 50, 4, None)),
        ("--estimates both.json --first-target-latency 60", (0.9, 20, 60, 2, 5)),
        ("--estimates pair.json --target-latency 9 --drafter-latency 2", (0.9, 9, None, 2, None)),
        ("", (0.9, 1, None, 0.1, None)),
    ],
)
def test_what_no_flag_gives_is_taken_from_estimates(words, taken, estimates, capsys):
    assert main(["simulate", "dsi", *words.split(), "--repeats", "2", "--json", "o.jsonl"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("from ")]
    for line in map(json.loads, Path("o.jsonl").read_text().splitlines()):
        assert tuple(line["asked"][name] for name in TAKEN) == taken
    given = [
        flag for flag in ("acceptance", "target-latency", "drafter-latency") if f"--{flag}" in words
    ]
    assert len(told) == (3 - len(given) if words else 0)


def test_it_is_said_what_is_taken_from_where(estimates, capsys):
    words = ["--estimates", "pair.json", "times.json", "--rule", "coupled", "--temperature", "0.8"]
    assert main(["simulate", "dsi", *words]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "from pair.json: acceptance 0.7 (coupled 0.8, little for big)",
        "from times.json: target latency 50 ms, then 20 ms (big)",
        "from times.json: drafter latency 5 ms, then 2 ms (little)",
    ]


@pytest.mark.parametrize(
    "words,named",
    [
        ("pair.json", "no latency in pair.json: `flowspec estimate latency --json` writes it"),
        ("pair.json --target-latency 9", "no latency in pair.json"),
        ("times.json", "no acceptance in times.json"),
        ("twice.json --acceptance 0.5", "in twice.json several fit: big and little, big and"),
        ("times.json both.json", "in times.json, both.json several fit"),
        ("pair.json pair.json", "several fit"),
        ("mean.json times.json", "several fit: coupled 0.8, classic 0.8"),
        ("both.json --temperature 0.8", "several fit: greedy 0, coupled 0.8, classic"),
        ("both.json --rule coupled", "several fit"),
        ("both.json --temperature 0.5", "none fits: greedy 0, coupled 0.8"),
        ("both.json --rule coupled --temperature 0", "none fits"),
        ("both.json --rule best", "--rule"),
        ("both.json --rule greedy --acceptance 0.5", "--rule and --temperature say which"),
        ("both.json --acceptance 1 --target-latency 2 --drafter-latency 1", "--estimates: flags"),
        (
            "slow.json",
            "--drafter-latency is 30: it must be above 0 and at most the target's 20; from",
        ),
        (
            "early.json",
            "--first-target-latency is 10.0: it must be at least that of later ones, 20; from",
        ),
    ],
)
def test_estimates_that_do_not_say_it_are_one_line_and_end_with_2(words, named, estimates, capsys):
    assert main(["simulate", "dsi", "--estimates", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and named in err


# ---- the grid ------------------------------------------------------------------------------------
def test_a_cell_holds_what_was_simulated_at_its_best_lookaheads(small):
    heat = heatmap.heat_map(small)
    assert heat.drafter_latency[:, 0].tolist() == [0.01, 0.25, 0.5, 0.75, 1]
    assert heat.acceptance[0].tolist() == [0.01, 0.25, 0.5, 0.75, 0.99]
    assert (heat.non_si == 50).all() and (heat.seed == 7).all() and (heat.servers == 3).all()
    assert np.isnan(heat.dsi[0]).all() and np.isnan(heat.si[0]).all()  # 1 / 0.04 > 3 servers
    assert np.isfinite(heat.free_si).all()
    assert (heat.dsi_lookahead[1] == 2).all() and (heat.dsi_lookahead[2:] == 1).all()
    for i, j in np.ndindex(5, 5):
        for k, found, simulated in (
            (heat.si_lookahead, Estimate(heat.si, heat.si_error), small.si),
            (heat.dsi_lookahead, Estimate(heat.dsi, heat.dsi_error), small.dsi),
            (heat.free_si_lookahead, Estimate(heat.free_si, heat.free_si_error), small.si),
        ):
            if k[i, j] > 0:
                at = (i, j, int(k[i, j]) - 1)
                assert found.mean[i, j] == simulated.mean[at]
                assert found.error[i, j] == simulated.error[at]


def test_the_grid_holds_each_settings_own_costs():
    done = heatmap.sweep(4, servers=3, tokens=500, repeats=100, seed=7)
    for token, costs in ((si_token, done.si), (dsi_token, done.dsi)):
        expected = 500 * token(done.setting)
        known = np.isfinite(costs.mean)
        off = abs(costs.mean - expected)[known]
        print(f"seed 7: at most {off.max():.2f} of 500 target latencies off")
        assert (off < 5 * costs.error[known] + 10).all()  # the ends of a text are not expected
    assert (known == done.valid).all()


def test_ratios_say_how_many_times_as_fast(small):
    heat = heatmap.heat_map(small)._replace(
        **{
            name: np.array([[cost]])
            for name, cost in zip(
                ("non_si", "si", "dsi", "free_si"), (8.0, 10.0, 4.0, 6.0), strict=True
            )
        }
    )
    ratios = {name: values(heat).item() for name, (_, values) in heatmap.RATIOS.items()}
    assert ratios == {
        "si_over_non_si": 0.8,
        "dsi_over_si": 2.5,
        "dsi_over_best_other": 2.0,
        "dsi_over_non_si": 2.0,
        "dsi_over_free_si": 1.5,
    }


def test_a_stored_heat_map_comes_back_whatever_the_order_of_its_lines(small, tmp_path):
    heat, file = heatmap.heat_map(small), tmp_path / "heatmap.csv"
    heatmap.write(heat, file)
    lines = file.read_text().splitlines(keepends=True)
    assert all(row["simulated"] == "true" for row in table(file))
    for text in (lines, [lines[0], *reversed(lines[1:])]):
        file.write_text("".join(text))
        for name, stored, made in zip(heat._fields, heatmap.read(file), heat, strict=True):
            np.testing.assert_array_equal(stored, made, err_msg=name)


def test_every_setting_is_written(small, tmp_path):
    heatmap.write_settings(small, tmp_path / "settings.csv")
    rows = table(tmp_path / "settings.csv")
    assert len(rows) == 5 * 5 * 4
    valid = [row for row in rows if int(row["servers_needed"]) <= 3]
    assert len(valid) == small.valid.sum() == (3 + 4 * 3) * 5
    assert [row for row in rows if row["dsi"]] == valid
    row = rows[np.ravel_multi_index((2, 3, 1), (5, 5, 4))]
    assert (row["drafter_latency"], row["acceptance"], row["lookahead"]) == ("0.5", "0.75", "2")
    assert float(row["si"]) == small.si.mean[2, 3, 1]
    assert float(row["dsi_error"]) == small.dsi.error[2, 3, 1]


def test_the_command_writes_tables_and_pictures_and_draws_them_again(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    first, again = tmp_path / "new" / "first", tmp_path / "again"
    words = ["simulate", "dsi", "heatmap", "--out"]
    assert main([*words, str(first), "--ndim", "3", "--tokens", "40"]) == 0
    assert "simulated: 36 valid settings" in capsys.readouterr().out
    assert {path.name for path in first.iterdir()} == PICTURES | {"settings.csv", "heatmap.csv"}
    assert main([*words, str(again), "--draw", str(first / "heatmap.csv")]) == 0
    assert {path.name for path in again.iterdir()} == PICTURES
    for name in PICTURES:
        picture = (first / name).read_bytes()
        assert picture.startswith(PNG) and picture == (again / name).read_bytes()


def test_without_matplotlib_the_tables_are_written_and_drawing_says_what_to_install(
    tmp_path, capsys, monkeypatch
):
    for module in ("flowspec.bench.heatmap", "flowspec.commands.simulate_dsi"):
        monkeypatch.setattr(f"{module}.can_draw", lambda: False)
    words = ["simulate", "dsi", "heatmap", "--out", str(tmp_path)]
    assert main([*words, "--ndim", "2", "--tokens", "20"]) == 0
    assert "install it" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"settings.csv", "heatmap.csv"}
    assert main([*words, "--draw", str(tmp_path / "heatmap.csv")]) == 2
    assert "install it" in capsys.readouterr().err


# ---- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words,named",
    [
        ("--target-latency 0", "--target-latency is 0"),
        ("--target-latency inf", "--target-latency is inf"),
        ("--drafter-latency 1.5", "--drafter-latency is 1.5"),
        ("--drafter-latency nan", "--drafter-latency is nan"),
        ("--drafter-latency 0", "--drafter-latency is 0"),
        ("--acceptance 1.01", "--acceptance is 1.01"),
        ("--acceptance=-0.1", "--acceptance is -0.1"),
        ("--lookahead 0", "--lookahead is 0"),
        ("--lookahead best", "--lookahead is 'best'"),
        ("--lookahead 1", "it takes 10"),
        ("--lookahead auto,1", "it takes 10"),
        ("--lookahead 2,3,4", "--lookahead is '2,3,4'"),
        ("--lookahead 2,", "--lookahead is ''"),
        ("--drafter-latency 0.0001", "any lookahead up to 1000"),
        ("--first-target-latency 0.5", "--first-target-latency is 0.5"),
        ("--first-drafter-latency nan", "--first-drafter-latency is nan"),
        ("--servers 0", "--servers is 0"),
        ("--tokens 0", "--tokens is 0"),
        ("--tokens 1000000", "--tokens is 1000000"),
        ("--repeats 0", "--repeats is 0"),
        ("--repeats 100000000", "--repeats is 100000000"),
        ("--seed=-1", "--seed is -1"),
        ("--seed few", "--seed"),
        ("--json no/where/x.jsonl", "--json"),
        ("heatmp", "heatmp"),
        ("heatmap", "--out"),
        ("heatmap --out x", "--ndim"),
        ("heatmap --out x --ndim 0", "--ndim is 0"),
        ("heatmap --out x --ndim 101", "--ndim is 101"),
        ("heatmap --out x --ndim 3 --draw f.csv", "--draw"),
        ("heatmap --out x --ndim 100 --repeats 50", "--repeats is 50"),
        ("heatmap --out x --draw f.csv --servers 7 --seed 0", "so --servers, --seed would mean"),
        ("heatmap --out x --draw f.csv --tokens 9", "so --tokens would mean"),
        ("heatmap --out x --draw f.csv --repeats 9", "so --repeats would mean"),
        ("heatmap --out x --ndim 2 --online", "--online"),
        ("--online --tokens 0", "--tokens is 0"),
        ("--online --lookahead 1", "it takes 10"),
        ("--rule greedy", "--rule and --temperature say which"),
        ("--temperature 0", "--rule and --temperature say which"),
        ("--estimates no/pair.json", "cannot read no/pair.json"),
        ("heatmap --out x --draw no/where.csv", "cannot read no/where.csv"),
        ("heatmap --out /proc/x --ndim 2", "--out: cannot make /proc/x"),
        ("heatmap --out /proc --ndim 2", "--out: cannot write /proc"),
    ],
)
def test_bad_input_is_one_line_and_ends_with_2(words, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", "dsi", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("flowspec: ") and named in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage,named",
    [
        (lambda text: "", "no column drafter_latency"),
        (lambda text: text.replace("dsi_lookahead", "k"), "no column dsi_lookahead"),
        (lambda text: text.replace("50", "fifty", 1), "line 2"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "one line a cell"),
        (lambda text: text.splitlines()[0] + "\n", "one line a cell"),
        (lambda text: text + "0.3,0.1\n", "line 27"),
        (lambda text: text + text.splitlines()[1] + "\n", "one line a cell"),
        (lambda text: "\0" + text, "heat map"),
        (lambda text: text.encode("utf-16"), "no CSV file"),
    ],
)
def test_a_damaged_heat_map_is_refused_by_name(small, tmp_path, damage, named):
    file = tmp_path / "heatmap.csv"
    heatmap.write(heatmap.heat_map(small), file)
    text = damage(file.read_text())
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=named) as caught:
        heatmap.read(file)
    assert str(file) in str(caught.value)


def test_help_leads_there(capsys):
    for words, named in (
        (["simulate"], "simulate dsi"),
        (["simulate", "dsi"], "heatmap"),
        (["simulate", "dsi", "heatmap"], "--draw"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        assert ended.value.code == 0 and named in " ".join(capsys.readouterr().out.split())
