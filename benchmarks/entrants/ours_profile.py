"""What each pipe of a learner takes by itself, from `learner.profile`: a row per pipe, as how often its own time fits into a second. `pull` is the whole."""

from __future__ import annotations

from fastrl_pipes.learner.bench_ours import about, built  # noqa: F401


def measure(job):
    learner = built(job, job["env"])
    learner.fit(env_steps=job["warmup"] + job["lead"])
    found = learner.profile(job["steps"])
    own = {row.name: row.own for row in found.rows} | {"pull": found.seconds}
    return {name: (found.pulls / max(seconds, 1e-9),) * 2 for name, seconds in own.items()}
