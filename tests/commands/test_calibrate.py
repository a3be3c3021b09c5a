"""`kvprism calibrate`: routes into a profile, on top of what it holds; an evaluation by them."""

from pathlib import Path

import pytest

from kvprism.profiles import Profile
from kvprism.routes import line_of

from .conftest import Run, failure, read_json

SMALL = ("--context", 128, "--continuation", 8, "--documents", 2, "--trials", 2, "--task", "needle",
         "--policy", "tova,keydiff", "--paper", "tova,snapkv", "--singles", "tova",
         "--sweeps", 0)  # fmt: skip


@pytest.fixture(scope="module")
def out(
    run: Run,
    text: Path,
    profiles: tuple[Path, Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A profile that held a probe's verdict, calibrated for one budget."""
    path = tmp_path_factory.mktemp("calibrated") / "tiny.json"
    path.write_bytes(profiles[0].read_bytes())
    report = path.with_name("report.json")
    result = run("calibrate", "tiny", "--text", text, "--out", path, "--budget", "64tok", *SMALL,
                 "--json", report)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (
        "polykv-best" in result.stdout
        and "best single policy on both halves: tova" in result.stdout
    )
    assert "layers' curves" not in result.stdout
    return path


def test_routes_join_what_the_profile_held(out: Path, profiles: tuple[Path, Path, Path]) -> None:
    before, after = Profile.load(profiles[0]), Profile.load(out)
    assert after.probe == before.probe and after.conditioning is not None
    ours, theirs = before.section_hashes(), after.section_hashes()
    assert [name for name in theirs if theirs[name] != ours.get(name)] == ["routes"]
    assert [(r.policy, r.tokens) for r in after.routes] == [("polykv", 64), ("polykv-best", 64)]
    report = read_json(out.with_name("report.json"))
    assert report["profile"] == after.hash.hex()
    assert [route["prefill"] for route in report["routes"]] == [str(r) for r in after.routes]
    assert report["budgets"][0]["single"] == "tova"


def test_the_same_command_measures_nothing_again(out: Path, run: Run, text: Path) -> None:
    records = out.with_name(out.name + ".records.jsonl")
    kept, hashed = records.read_bytes(), Profile.load(out).hash
    assert (
        run(
            "calibrate", "tiny", "--text", text, "--out", out, "--budget", "64tok", *SMALL
        ).exit_code
        == 0
    )
    assert records.read_bytes() == kept and Profile.load(out).hash == hashed


def test_a_variant_joins_the_routes_that_there_are(
    out: Path, run: Run, text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(out.read_bytes())
    result = run("calibrate", "tiny", "--text", text, "--out", path, "--budget", "64tok", *SMALL,
                 "--records", out.with_name(out.name + ".records.jsonl"),
                 "--route", "polykv-cosine-uniform")  # fmt: skip
    assert result.exit_code == 0, result.output
    before, after = Profile.load(out), Profile.load(path)
    [added] = [route for route in after.routes if route not in before.routes]
    assert added.policy == "polykv-cosine-uniform" and set(before.routes) < set(after.routes)


def test_a_decode_phase_of_its_own_is_stored_shown_and_followed(
    out: Path, run: Run, text: Path, tmp_path: Path
) -> None:
    path, rows = tmp_path / "p.json", tmp_path / "rows.json"
    path.write_bytes(out.read_bytes())
    result = run("calibrate", "tiny", "--text", text, "--out", path, "--budget", "64tok", *SMALL,
                 "--records", out.with_name(out.name + ".records.jsonl"),
                 "--route", "polykv", "--decode")  # fmt: skip
    assert result.exit_code == 0 and "its decode phase" in result.stdout, result.output
    before, [made, best] = Profile.load(out), Profile.load(path).routes
    assert (made.layers, best) == (before.routes[0].layers, before.routes[1])
    assert sum(layer.tokens or 0 for layer in made.decode) == 4 * 64
    result = run("eval", "perplexity", "--text", text, "--context", 128, "--continuation", 8,
                 "--documents", 2, "--profile", path, "--policy", "raw", "--json", rows,
                 "--decode-policy", "polykv", "--decode-budget", "64tok")  # fmt: skip
    assert result.exit_code == 0, result.output
    followed = {row["decode"] for row in read_json(rows)} - {None}
    assert followed == {line_of(made.decode).replace(",", "tok,") + "tok"}


def test_an_evaluation_follows_the_route(out: Path, run: Run, text: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    result = run("eval", "perplexity", "--text", text, "--context", 128, "--continuation", 8,
                 "--documents", 2, "--profile", out, "--policy", "raw,polykv,polykv-best",
                 "--budget", "64tok", "--json", rows)  # fmt: skip
    assert result.exit_code == 0, result.output
    arms = {row["policy"]: row["fraction"] for row in read_json(rows)}
    assert arms.keys() == {"raw", "polykv", "polykv-best"}
    assert all(0.45 < arms[policy] <= 64 / 127 for policy in ("polykv", "polykv-best"))


def test_a_context_shorter_than_the_budget_is_said_to_be_whole(
    out: Path, run: Run, text: Path
) -> None:
    result = run("eval", "perplexity", "--text", text, "--context", 50, "--continuation", 8,
                 "--documents", 2, "--profile", out, "--policy", "polykv",
                 "--budget", "64tok")  # fmt: skip
    assert result.exit_code == 0
    assert "polykv 64tok: no compression, the budget is all of the cache" in result.stdout


def test_a_dry_run_takes_the_route(out: Path, run: Run, tmp_path: Path) -> None:
    given = ("plan", "--policy", "polykv-best", "--tokens", 200, "--profile", out)
    result = run(*given, "--budget", "64tok", "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert 0.30 < read_json(tmp_path / "plan.json")["fraction"] <= 64 / 200
    assert "routes are for 64tok" in failure(run(*given, "--budget", "128tok"))


def test_an_evaluation_without_a_route_is_refused_early(
    run: Run, out: Path, text: Path, profiles: tuple[Path, Path, Path]
) -> None:
    for profile, why in ((None, "got no profile"), (profiles[0], "a profile without one")):
        given = () if profile is None else ("--profile", profile)
        result = run("eval", "needle", "--policy", "polykv", "--budget", "64tok", *given)
        assert result.exit_code == 1 and "ProfileMismatch" in failure(result)
        assert why in failure(result) and "kvprism calibrate" in failure(result)
    result = run("eval", "perplexity", "--text", text, "--context", 128, "--continuation", 8,
                 "--documents", 2, "--policy", "polykv", "--budget", "100tok",
                 "--profile", out)  # fmt: skip
    assert result.exit_code == 2 and "routes are for 64tok" in failure(result)


@pytest.mark.parametrize(
    "options, why",
    [
        (("--budget", "0.30"), "takes tokens a layer such as 128tok,256tok, got '0.30'"),
        (("--budget", "0tok"), "a budget of 0 tokens a layer"),
        (("--preference", "norm"), "unknown preference 'norm'"),
        (("--sharing", "norm"), "unknown sharing 'norm'"),
        (("--task", "sorting"), "unknown task kind 'sorting'"),
        (("--policy", "spectrum"), "unknown eviction policy 'spectrum'"),
        (("--route", "snapkv"), "unknown routed policy 'snapkv'"),
        (("--decode", "--route", "polykv-best"), "only polykv's routes get a decode phase"),
        (("--decode", "--paper", "defensivekv"), "none of ['defensivekv'] evicts while tokens"),
        (("--records", "RECORDS"), "not a file of calibration records"),
    ],
)
def test_bad_settings_are_refused(
    run: Run, text: Path, tmp_path: Path, options: tuple[str, ...], why: str
) -> None:
    (tmp_path / "other").write_text("{}\n")
    given = [tmp_path / "other" if each == "RECORDS" else each for each in options]
    result = run("calibrate", "tiny", "--text", text, "--out", tmp_path / "p", *SMALL, *given)
    assert result.exit_code == 2 and why in failure(result)
    assert not (tmp_path / "p").exists()


def test_a_profile_of_another_model_is_not_written_to(
    run: Run, text: Path, profiles: tuple[Path, Path, Path]
) -> None:
    before = profiles[2].read_bytes()
    result = run(
        "calibrate", "tiny", "--text", text, "--out", profiles[2], "--budget", "64tok", *SMALL
    )
    assert result.exit_code == 1 and "ProfileMismatch" in failure(result)
    assert profiles[2].read_bytes() == before
