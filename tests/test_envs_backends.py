"Every way of running environments makes true transitions, seeds the same, and turns faults into errors by a deadline"

import os
import signal
import subprocess
import sys
import time
from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from fastrl_pipes.envs.autoreset import VectorBackend
from fastrl_pipes.envs.backends import make_backend
from fastrl_pipes.envs.doubles import AnyAction, Counting, CountingVector, Faulty, Nested
from fastrl_pipes.envs.spaces import action_map, random_actions
from fastrl_pipes.envs.workers import Workers
from fastrl_pipes.errors import WorkerError

LENGTHS = (5, 3, 8, 1)


def factories(n=3, make=Counting, **more):
    return [partial(make, lengths=LENGTHS[i % 4 :] + LENGTHS[: i % 4], start=100_000 * i, **more) for i in range(n)]


def foreign(cls, mode, **more):
    return VectorBackend(cls(factories(), autoreset_mode=mode, **more), owned=True)


BACKENDS = {
    "single": lambda: make_backend(factories(1)),
    "sync": lambda: make_backend(factories(), mode="sync"),
    "workers": lambda: make_backend(factories(), mode="workers", workers=2),
    "async": lambda: make_backend(factories(), mode="async"),
    "native": lambda: make_backend("fastrl/CountingVector-v0", 3, mode="native"),
}
for _mode in AutoresetMode:
    BACKENDS[f"live vector {_mode.value}"] = lambda m=_mode: make_backend(CountingVector(3, m))
    BACKENDS[f"SyncVectorEnv {_mode.value}"] = lambda m=_mode: foreign(SyncVectorEnv, m)
    BACKENDS[f"AsyncVectorEnv {_mode.value}"] = lambda m=_mode: foreign(AsyncVectorEnv, m)


@pytest.fixture(params=BACKENDS)
def backend(request):
    made = BACKENDS[request.param]()
    yield made
    made.close()


def zeros(backend):
    return np.zeros((backend.n, *backend.action_space.shape), backend.action_space.dtype)


def gone(pids, seconds=10.0):
    "Whether all processes end in time; a zombie that nobody has collected has ended too"
    def alive(pid):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as f:
                return f.read().rpartition(")")[2].split()[0] != "Z"
        except (ProcessLookupError, FileNotFoundError):
            return False

    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


# ---- transitions

def test_every_true_row_is_one_step_of_one_episode(backend):
    "Hundreds of steps, done rows included: next = obs + 1, reward, flags, first and the episode's length are right"
    n, episode = backend.n, np.full(backend.n, -1)
    length = np.zeros(n, int)
    for _ in range(300):
        obs = backend.observe()
        first = backend.first[:, 0]
        assert (obs[first, 0] % 1000 == 0).all(), "an episode begins with its first observation"
        episode[first] += 1
        length[first] = 0
        kept = obs.copy()
        after, reward, terminated, truncated, valid = backend.step(zeros(backend))
        assert reward.shape == terminated.shape == truncated.shape == (n, 1)
        assert reward.dtype == np.float32 and terminated.dtype == truncated.dtype == bool
        assert (obs == kept).all(), "what was observed is still there after the step"
        rows = np.ones(n, bool) if valid is None else valid
        assert rows.any(), "at least one row of each step is true"
        assert (after[rows] == obs[rows] + 1).all() and (reward[rows] == after[rows]).all()
        assert (obs[rows, 0] == 100_000 * np.flatnonzero(rows) + 1000 * episode[rows] + length[rows]).all()
        length[rows] += 1
        over = length == np.array([LENGTHS[(e + i) % 4] for i, e in enumerate(episode)])
        assert (terminated[:, 0] == (rows & over & (episode % 2 == 0))).all()
        assert (truncated[:, 0] == (rows & over & (episode % 2 == 1))).all()
    assert (episode > 40).all()


def test_no_step_is_lost_where_nothing_is_fake(backend):
    fake = getattr(backend, "autoreset", None) is AutoresetMode.NEXT_STEP
    seen = []
    for _ in range(40):
        backend.observe()
        seen.append(backend.step(zeros(backend))[-1])
    assert any(v is not None for v in seen) == fake


def test_rows_that_all_end_together_never_make_a_step_without_a_true_row():
    backend = make_backend(CountingVector(3, AutoresetMode.NEXT_STEP, lengths=[4]))
    for t in range(40):
        obs = backend.observe()
        assert backend.first.all() == (t % 4 == 0) == backend.first.any()
        after, *_, valid = backend.step(zeros(backend))
        assert valid is None and (after == obs + 1).all()


def test_nothing_is_reset_before_somebody_acts_again():
    env = Counting(lengths=2)
    backend = make_backend(env)
    for _ in range(2):
        backend.observe()
        after = backend.step(zeros(backend))[0]
    assert env.episode == 0 and after == 2
    assert backend.observe() == 1000 and env.episode == 1
    assert backend.observe() == 1000 and env.episode == 1, "asking twice changes nothing"


def test_reset_all_begins_all_episodes_anew(backend):
    for _ in range(4):
        backend.observe()
        backend.step(zeros(backend))
    backend.reset_all()
    obs = backend.observe()
    assert backend.first.all() and (obs % 1000 == 0).all()
    after, *_, valid = backend.step(zeros(backend))
    assert valid is None and (after == obs + 1).all()


def test_a_step_without_observe_and_a_wrong_number_of_actions_are_refused(backend):
    backend.observe()
    with pytest.raises(ValueError, match="rows"):
        backend.step(np.zeros((backend.n + 1, 1), np.float32))
    backend.step(zeros(backend))
    with pytest.raises(ValueError, match="observe"):
        backend.step(zeros(backend))


@pytest.mark.parametrize("mode", [None, "Sometimes"])
def test_an_unknown_autoreset_mode_is_refused(mode):
    envs = CountingVector(2)
    envs.metadata = {"autoreset_mode": mode}
    with pytest.raises(LookupError, match="NextStep"):
        make_backend(envs)


def test_a_missing_final_observation_is_an_error():
    class Forgets(CountingVector):
        def step(self, actions):
            return (*super().step(actions)[:4], {})

    backend = make_backend(Forgets(2, AutoresetMode.SAME_STEP))
    with pytest.raises(WorkerError, match="final_obs"):
        for _ in range(20):
            backend.observe()
            backend.step(zeros(backend))


# ---- seeds

def trajectory(backend, steps=120):
    rng, actions, rows = np.random.default_rng(1), action_map(backend.action_space), []
    for _ in range(steps):
        obs = backend.observe().copy()
        action = actions.to_env(random_actions(backend.action_space, backend.n, rng))
        rows.append([obs, *(x.copy() for x in backend.step(action)[:4])])
    backend.close()
    return [np.stack(column) for column in zip(*rows)]


@pytest.mark.parametrize("id", ["Pendulum-v1", "CartPole-v1"])
def test_modes_with_the_same_seed_give_the_same_bits(id):
    "Several rows in one process, in workers, in AsyncVectorEnv, and gymnasium's own SyncVectorEnv"
    make = partial(make_backend, id, 3, seed=5)
    sync = trajectory(make("sync"))
    assert all((a == b).all() for a, b in zip(sync, trajectory(make("sync"))))
    disabled = SyncVectorEnv([partial(gymnasium.make, id)] * 3, autoreset_mode="Disabled")
    for other in (make("workers", workers=2), make("async"), make_backend(disabled, seed=5)):
        assert all((a == b).all() for a, b in zip(sync, trajectory(other))), other.mode
    assert not (sync[0] == trajectory(make_backend(id, 3, "sync", seed=6))[0]).all()


def test_the_first_observation_is_what_gymnasium_gives_for_the_seed():
    expected = [gymnasium.make("Pendulum-v1").reset(seed=7 + i)[0] for i in range(2)]
    for mode in ("sync", "workers", "async"):
        backend = make_backend("Pendulum-v1", 2, mode, seed=7)
        assert (backend.observe() == expected).all()
        backend.close()
    native = make_backend("CartPole-v1", 2, "native", seed=7)
    assert (native.observe() == gymnasium.make_vec("CartPole-v1", 2).reset(seed=7)[0]).all()


def test_only_the_first_reset_is_seeded():
    envs = [Counting(lengths=2), Counting(lengths=3)]
    backend = make_backend(envs, seed=3)
    for _ in range(10):
        backend.observe()
        backend.step(zeros(backend))
    assert [e.seeds[0] for e in envs] == [3, 4] and all(s is None for e in envs for s in e.seeds[1:])
    backend.seed(8)
    backend.observe()
    assert [e.seeds[-1] for e in envs] == [8, 9]
    for mode in AutoresetMode:
        vector = CountingVector(2, mode)
        backend = make_backend(vector, seed=3)
        for _ in range(10):
            backend.observe()
            backend.step(zeros(backend))
        assert vector.seeds[0] == 3 and all(s is None for s in vector.seeds[1:])


# ---- spaces

@pytest.mark.parametrize("mode", ["sync", "workers", "async", "SameStep", "NextStep"])
@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_nested_observations(kind, mode):
    made = factories(2, Nested, kind=kind)
    if mode in ("SameStep", "NextStep"):
        backend = VectorBackend(SyncVectorEnv(made, autoreset_mode=mode))
    else:
        backend = make_backend(made, mode=mode)
    for _ in range(30):
        obs = backend.observe()
        after, *_, valid = backend.step(zeros(backend))
        rows = slice(None) if valid is None else valid
        for nest, count in ((obs, (obs["count"] if kind == "dict" else obs[0])[rows, 0]),
                            (after, (obs["count"] if kind == "dict" else obs[0])[rows, 0] + 1)):
            number, image, inner = nest.values() if kind == "dict" else nest
            assert (number[rows, 0] == count).all() and image.shape == (2, 2, 2, 3)
            assert image.dtype == np.uint8 and (image[rows, 1, 1, 1] == count % 256).all()
            assert inner["joints"].dtype == np.float64 and (inner["joints"][rows, 1] == count).all()
            assert inner["phase"].shape == (2,) and (inner["phase"][rows] == count % 1000).all()
    backend.close()


SPACES = [spaces.Discrete(3), spaces.Discrete(4, start=-2), spaces.MultiDiscrete([3, 2, 4]),
          spaces.MultiDiscrete([[2, 3], [4, 5]]), spaces.MultiBinary(3), spaces.MultiBinary((2, 2)),
          spaces.Box(-3, 11, (2,)), spaces.Box(np.array([[-1.0, 5], [0, -7]]), np.array([[1.0, 6], [9, -5]]), dtype=np.float64),
          spaces.Box(-2, 5, (3,), np.int8), spaces.Box(0, np.inf, (2,))]


@pytest.mark.parametrize("mode", ["sync", "workers", "async"])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_environment_takes_the_actions_of_every_space(space, mode):
    "AnyAction refuses what is not in its space and shows what it got"
    if isinstance(space, spaces.Box) and not space.is_bounded():
        space = spaces.Box(-np.inf, np.inf, space.shape)  # random actions pass unscaled
    backend = make_backend([partial(AnyAction, space)] * 2, mode=mode)
    rng, actions = np.random.default_rng(0), action_map(space)
    for _ in range(20 if mode == "sync" else 3):
        backend.observe()
        raw = actions.to_env(random_actions(space, 2, rng))
        after = backend.step(raw)[0]
        assert np.allclose(after, raw.reshape(2, -1).astype(np.float32))
    backend.close()


def test_what_an_environment_may_return():
    "Lists, Python numbers and wider floats fit; an array that the environment uses again is copied"
    class Loose(Counting):
        def reset(self, **kwargs):
            return [float(super().reset(**kwargs)[0][0])], {}

        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs.astype(np.float64), np.float32(reward), *(np.bool_(x) for x in rest[:2]), {}

    class Reuses(Counting):
        def _show(self):
            self.array = getattr(self, "array", np.zeros(1, np.float32))
            self.array[:] = self.count
            return self.array

    for env in (Loose(), Reuses()):
        backend = make_backend(env)
        for _ in range(20):
            obs = backend.observe()
            assert obs.dtype == np.float32 and (backend.step(zeros(backend))[0] == obs + 1).all()


def test_environments_with_other_spaces_are_refused_by_name():
    for mode in ("sync", "workers"):
        with pytest.raises(ValueError, match=r"environment 1 \(Pendulum-v1\).*observation_space"):
            make_backend(["CartPole-v1", "Pendulum-v1"], mode=mode)
    for space in (spaces.Tuple([spaces.Discrete(2)]), spaces.Text(3)):
        with pytest.raises(TypeError, match="action_space"):
            make_backend(partial(AnyAction, space) if space.shape is not None else _with_action_space(space))


def _with_action_space(space):
    env = Counting()
    env.action_space = space
    return env


def test_an_id_registered_by_the_script_reaches_the_workers():
    gymnasium.register("test/Mine-v0", lambda **kwargs: Counting(**kwargs))
    backend = make_backend("test/Mine-v0", 2, "workers", start=5000)
    assert (backend.observe() == 5000).all()
    backend.close()
    gymnasium.registry.pop("test/Mine-v0")


@pytest.mark.parametrize("mode", ["single", "sync", "workers", "async"])
def test_render(mode):
    backend = make_backend([partial(Counting, render_mode="rgb_array")] * (1 if mode == "single" else 2), mode=mode)
    backend.observe()
    backend.step(zeros(backend))
    frames = backend.render()
    assert len(frames) == backend.n and frames[0].shape == (4, 4, 3) and (frames[-1] == 1).all()
    backend.close()
    with pytest.raises(ValueError, match="rgb_array"):
        make_backend(Counting()).render()


# ---- the choice of a mode

class Slow(Counting):
    def step(self, action):
        time.sleep(0.001)
        return super().step(action)


def test_auto_takes_the_fastest(monkeypatch):
    monkeypatch.setattr("fastrl_pipes.envs.backends.usable_cpus", lambda: 2)
    for expected, envs, n in (("single", "CartPole-v1", 1), ("native", "CartPole-v1", 2), ("sync", "fastrl/NoOp-v0", 2),
                              ("workers", [Slow, Slow], 1), ("native", "fastrl/CountingVector-v0", 2),
                              ("single", Counting(), 1), ("live", CountingVector(2), 1)):
        backend = make_backend(envs, n)
        assert backend.mode == expected
        backend.close()


def test_auto_refuses_a_native_version_that_shows_something_else():
    class Other(CountingVector):
        def __init__(self, num_envs):
            super().__init__(num_envs)
            self.single_observation_space = spaces.Box(0, 1, (7,))

    gymnasium.register("test/Other-v0", Counting, vector_entry_point=Other)
    assert make_backend("test/Other-v0", 2).mode == "sync"
    gymnasium.registry.pop("test/Other-v0")


def test_wrong_calls_say_what_to_change():
    vector, env = CountingVector(2), Counting()
    for error, word, kwargs in (
        (LookupError, "CartPole-v1", dict(envs="CartPol-v1")),
        (LookupError, "did you mean 'sync'", dict(envs=Counting, mode="snyc")),
        (ValueError, "one per environment", dict(envs=[Counting, Counting], n=3)),
        (ValueError, "vector version", dict(envs="Pendulum-v1", n=2, mode="native")),
        (ValueError, "live VectorEnv", dict(envs=vector, n=5)),
        (ValueError, "live VectorEnv", dict(envs=vector, mode="workers")),
        (ValueError, "live Env", dict(envs=env, n=2)),
        (ValueError, "unless `envs` are ids", dict(envs=Counting, render_mode="rgb_array")),
        (ValueError, "'auto' or 'sync'", dict(envs=[Counting, Counting], mode="single")),
        (ValueError, "one per environment", dict(envs=[])),
        (ValueError, "n", dict(envs=Counting, n=0)),
        (TypeError, "ids, factories", dict(envs=3)),
        (TypeError, "passed live", dict(envs=partial(CountingVector, 2))),
    ):
        with pytest.raises(error, match=word):
            make_backend(**kwargs)


# ---- faults

def drive(backend, steps=6):
    for _ in range(steps):
        backend.observe()
        backend.step(zeros(backend))


BAD_OBSERVATIONS = ["nan_observation", "wrong_shape", "wrong_dtype", "no_array"]


@pytest.mark.parametrize("mode", ["single", "sync", "workers"])
@pytest.mark.parametrize("fault,at", [(f, at) for f in [*BAD_OBSERVATIONS, "raise"] for at in (0, 4)] + [("nan_reward", 4)])
def test_a_fault_names_the_environment_and_the_step(fault, mode, at):
    faulty = partial(Faulty, fault, at)
    backend = make_backend([faulty] if mode == "single" else [Counting, Counting, faulty], mode=mode, timeout=20)
    index = backend.n - 1
    with pytest.raises(WorkerError, match=rf"environment {index} \(Faulty\), step {at}: field .*, expected"):
        drive(backend)
    pids = [p.pid for p in getattr(backend, "_processes", [])]
    backend.close()
    backend.close()
    assert gone(pids)


@pytest.mark.parametrize("fault", ["nan_observation", "nan_reward", "wrong_shape", "raise"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_fault_in_a_foreign_vector_environment_is_an_error(fault, mode):
    backend = VectorBackend(SyncVectorEnv([Counting, partial(Faulty, fault, 4)], autoreset_mode=mode))
    with pytest.raises(WorkerError, match="step 4"):
        drive(backend)


def test_nan_passes_where_one_says_so():
    for mode in ("sync", "workers"):
        backend = make_backend([partial(Faulty, "nan_observation", 2)] * 2, mode=mode, check=False)
        drive(backend, 2)
        assert np.isnan(backend.observe()).all()
        backend.close()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_infinite_observation_and_a_reward_too_large_are_refused_a_large_number_is_not():
    class Big(Counting):
        value, pay = 1e30, 1.0

        def _show(self):
            return np.array([self.value], np.float32)

        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, self.pay, *rest

    drive(make_backend(Big()))
    env = Big()
    env.value = np.inf
    with pytest.raises(WorkerError, match="observation"):
        drive(make_backend(env))
    env = Big()
    env.pay = 1e300
    with pytest.raises(WorkerError, match="reward"):
        drive(make_backend(env))
    env.pay = np.zeros(2)
    with pytest.raises(WorkerError, match="one number"):
        drive(make_backend(env))


def test_after_a_fault_in_this_process_the_next_episode_can_begin():
    backend = make_backend([Counting, partial(Faulty, "nan_reward", 3)], mode="sync")
    with pytest.raises(WorkerError):
        drive(backend)
    obs = backend.observe()
    assert backend.first.all()
    assert (backend.step(zeros(backend))[0] == obs + 1).all()


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("fault", ["exit", "kill", "hang", "stop"])
def test_a_worker_that_is_lost_is_an_error_by_the_deadline(fault, at):
    backend = make_backend([Counting, Counting, partial(Faulty, fault, at)], mode="workers", workers=2, timeout=2.0)
    pids, start = [p.pid for p in backend._processes], time.monotonic()
    with pytest.raises(WorkerError, match=rf"environment 2 \(Faulty\), step {at}:"):
        drive(backend)
    assert time.monotonic() - start < 10 and gone(pids, 5)
    with pytest.raises(WorkerError, match="closed"):
        backend.reset_all()
    backend.close()
    backend.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_killed_or_stopped_from_outside(how):
    backend = make_backend([Counting] * 4, mode="workers", workers=2, timeout=2.0)
    drive(backend, 3)
    pids = [p.pid for p in backend._processes]
    os.kill(pids[1], how)
    with pytest.raises(WorkerError, match="environment [23] "):
        drive(backend)
    assert gone(pids, 5)


@pytest.mark.filterwarnings("ignore:.*ERROR")  # gymnasium prints the worker's traceback as warnings
@pytest.mark.parametrize("fault", ["exit", "kill", "hang", "stop", "raise"])
def test_async_of_gymnasium_does_not_hang_either(fault):
    backend = make_backend([Counting, partial(Faulty, fault, 3)], mode="async", timeout=2.0)
    pids, start = [p.pid for p in backend.env.processes], time.monotonic()
    with pytest.raises(WorkerError, match="environment 1 .*, step 3"):
        drive(backend)
    backend.close()
    backend.close()
    assert time.monotonic() - start < 12 and gone(pids, 5)


def test_a_factory_that_fails_in_a_worker_is_an_error():
    for factory in (partial(Counting, ends="never"), partial(os._exit, 5)):
        with pytest.raises(WorkerError, match="build"):
            Workers([Counting, factory], timeout=5)


def test_close_waits_for_nobody_for_long():
    backend = make_backend([Counting] * 2, mode="workers", timeout=2.0)
    pids = [p.pid for p in backend._processes]
    os.kill(pids[0], signal.SIGSTOP)
    start = time.monotonic()
    backend.close()
    assert time.monotonic() - start < 8 and gone(pids, 5)


def test_a_backend_that_is_forgotten_takes_its_processes_along():
    pids = [p.pid for p in make_backend([Counting] * 2, mode="workers")._processes]
    assert gone(pids, 5)


def test_an_interrupt_while_workers_are_busy_leaves_a_usable_backend(monkeypatch):
    backend = make_backend(factories(4), mode="workers", workers=2)
    drive(backend, 3)
    backend.observe()
    collect = backend._collect

    def interrupt(workers, *rest):
        if workers:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(backend, "_collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        backend.step(zeros(backend))
    monkeypatch.setattr(backend, "_collect", collect)
    for t in range(30):
        obs = backend.observe()
        assert backend.first.all() or t > 0
        after, reward, *_ = backend.step(zeros(backend))
        assert (after == obs + 1).all() and (reward == after).all()
    backend.close()


SCRIPT = """
import sys, time
from functools import partial
import numpy as np
from fastrl_pipes.envs.backends import make_backend
from fastrl_pipes.envs.doubles import Counting, Faulty
backend = make_backend([Counting, partial(Faulty, {fault!r}, 2)], mode="workers", workers=2, timeout=60)
print(*[p.pid for p in backend._processes], flush=True)
for _ in range(2):
    backend.observe()
    backend.step(np.zeros((2, 1), np.float32))
print("stepped", flush=True)
{end}
"""  # no `if __name__ == "__main__"`: a script needs none


@pytest.mark.parametrize("fault,end", [("none", "time.sleep(60)"), ("hang", "")])
def test_no_orphan_where_the_parent_is_killed(fault, end):
    "Workers that wait for a word, and one that hangs in an environment, end with a parent killed by SIGKILL"
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT.format(fault=fault, end=end)], stdout=subprocess.PIPE, text=True)
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2
    if fault == "none":
        assert parent.stdout.readline() == "stepped\n"
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    assert gone(pids)


def test_a_script_without_a_guard_that_never_closes_ends_by_itself(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(fault="none", end=""))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("stepped") == 1
    assert gone([int(p) for p in done.stdout.splitlines()[0].split()])


def test_workers_import_no_torch():
    "A worker's memory and its start are those of NumPy and gymnasium"
    code = "import sys, fastrl_pipes.envs.workers, fastrl_pipes.envs.doubles; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
