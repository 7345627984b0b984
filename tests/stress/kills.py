"""Runs killed at any moment and continued: in the end they are, bit for bit, the run that was let alone."""

from collections.abc import Iterator

from ppap.methods.engine import Engine
from tests.stress.material import Lab, Report, base, differences, done, results, training
from tests.stress.process import Counter, call, hooked, killed_at

STEPS, KILLS = 200, 10
KINDS = {
    "plain": [f"--train.steps={STEPS}", "--train.val-every=40"],
    "cached features": [f"--train.steps={STEPS}", "--data.cache-features"],
    "set of seeds": [f"--train.steps={STEPS // 2}", "--seeds", "0", "1"],
    "comparison": [
        f"--train.steps={STEPS // 2}",
        "--compare.rows",
        "frozen",
        "fixed",
        "ppap",
        "--compare.steps=20",
        "--compare.starts=2",
    ],
}


def random_kills(lab: Lab) -> Iterator[Report]:
    """10 kills at random moments of 200 steps, for each kind of run."""
    rng = lab.rng("kills")
    for kind in lab.some(KINDS):
        report, place = Report(f"kill and resume: {kind}"), lab.place(f"kills {kind}")
        options = [f"--data.cache-dir={place / 'cache'}", *KINDS[kind]]
        if lab.share < 0.1:
            options = [
                o.replace(f"steps={STEPS}", "steps=20").replace(f"={STEPS // 2}", "=10") for o in options
            ]
        total = 20 if lab.share < 0.1 else STEPS
        kills = max(2, lab.number(KILLS)) if lab.share < 1 else KILLS
        first = base(place / "data", place / "whole", *options)
        done(training(*first))
        argv, out, counter = base(place / "data", place / "killed", *options), place / "killed", Counter()

        def counted(work, counter=counter):
            def run():
                hooked(Engine, "train_step", counter.add)
                return work()

            return run

        def life(argv=argv, out=out):
            begun = (out / "config.json").exists() or (out / "seeds.json").exists()
            return training("--resume", out) if begun else training(*argv)

        killed = lives = 0
        while killed < kills and lives < 4 * kills:
            lives += 1
            count, delay = rng.randint(1, max(2 * total // (kills + 1), 1)), rng.uniform(0, 0.02)
            ended = killed_at(counted(life()), counter, count, delay)
            if ended.code == -9:
                killed += 1
            elif ended.code == 0:
                break
            else:
                report.fault(f"{kind}: exit code {ended.code} after {killed} kills: {ended.text[-1500:]}")
                break
        ended = call(life(), 300)
        report.count("kills", killed)
        if ended.code != 0:
            report.fault(f"{kind}: the last --resume ended with {ended.code}: {ended.text[-1500:]}")
        else:
            wrong = differences(results(place / "whole"), results(out))
            report.expect(not wrong, "runs bit for bit the same", f"{kind}: other {wrong}")
        yield report
