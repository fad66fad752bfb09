"""From pixels: the environment's answers are known, frames do not reach over a reset, and images stay bytes up to the network."""
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import fastrl_pipes.agents.ddpg as page
from fastrl_pipes.envs.pixels import PixelReach, pixel_reach
from fastrl_pipes.pipes.graph import find_pipe


def test_it_is_an_environment():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(PixelReach(), skip_render_check=True)
        env = gymnasium.make("fastrl/PixelReach-v0", render_mode="rgb_array", size=24)
    env.reset(seed=0)
    assert env.observation_space.shape == (3, 24, 24) and env.render().shape == (256, 256, 3)


def test_the_picture_says_where_things_are():
    env = PixelReach(size=64)
    for seed in range(20):
        frame, _ = env.reset(seed=seed)
        env.goal = -env.position  # out of the way
        rows, columns = np.nonzero(env._see() > 200)
        seen = np.array([columns.mean(), -rows.mean()]) / 32 + np.array([-1, 1]) + np.array([0.5, -0.5]) / 32
        if np.linalg.norm(env.position - env.goal) > 0.6:
            np.testing.assert_allclose(seen, env.position, atol=0.03)


def test_pushing_moves_and_the_reward_is_what_was_gained():
    env = PixelReach(friction=0.5, push=0.1)
    env.reset(seed=1)
    env.position, env.goal = np.zeros(2), np.array([0.5, 0.0])
    _, reward, terminated, truncated, _ = env.step([1, 0])
    assert reward == pytest.approx(1.0) and not terminated and not truncated
    _, reward, *_ = env.step([0, 0])
    assert reward == pytest.approx(0.5), "friction takes half of the velocity"
    for _ in range(30):
        env.step([1, 1])
    assert env.position.tolist() == [0.9, 0.9] and env.velocity.tolist() == [0, 0], "walls stop it"


def test_the_good_push_beats_chance():
    def gained(act):
        total = left = 0.0
        for seed in range(30):
            env = PixelReach()
            env.reset(seed=seed)
            start = env.distance
            total += sum(env.step(act(env))[1] for _ in range(env.length)) / start
            left = max(left, env.distance)
        return total / 30, left
    rng = np.random.default_rng(0)
    share, left = gained(lambda env: env.best_action())
    assert share > 9.9 and left < 0.02, "it arrives, and stays"
    assert gained(lambda env: rng.uniform(-1, 1, 2))[0] < 1


def test_frames_do_not_reach_over_a_reset():
    pipe = page.GymStepper("fastrl/PixelReach-v0", seed=0)
    for _ in range(95):
        step = next(pipe)
        first = step.step_n[0, 0] == 1
        assert (step.state[0, 0] == step.state[0, 1]).all() == bool(first) or step.step_n[0, 0] == 2
        assert (step.next_state[0, :2] == step.state[0, 1:]).all(), "one new frame at each step, the last of an episode too"


def test_bytes_from_the_environment_to_the_network():
    torch.manual_seed(0)
    seen = []

    class Watched(page.Actor):
        def forward(self, state):
            seen.append((state.dtype, tuple(state.shape)))
            return super().forward(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nets = [net((3, 32, 32), 2, 16, 16, conv_block=page.ddpg_conv2d_block) for net in (Watched, page.Critic)]
    actor, critic = nets
    learner = page.DDPGLearner(actor, critic, page.GymStepper("fastrl/PixelReach-v0", page.DDPGAgent(actor), seed=0), [], bs=8, max_sz=64)
    before = [p.detach().clone() for p in (*actor.parameters(), *critic.parameters())]
    statistics = critic.state_layers[0][1].running_mean.clone()
    seen.clear()
    row = learner.fit(env_steps=12)[-1]
    assert {kind for kind, _ in seen} == {torch.uint8} and {shape for _, shape in seen} == {(1, 3, 32, 32), (8, 3, 32, 32)}
    memory = find_pipe(learner, page.ExperienceReplay).memory
    assert memory.layout.itemsize == 2 * 3 * 32 * 32 + 2 * 4 + 4 + 4, "bytes are kept as bytes"
    assert np.isfinite(row["critic_loss"]) and any(not torch.equal(p, q) for p, q in zip((*actor.parameters(), *critic.parameters()), before))
    assert not torch.equal(statistics, critic.state_layers[0][1].running_mean), "batch norm learns its statistics"


def test_more_than_three_frames_warn_unless_told():
    with pytest.warns(UserWarning, match="4 channels"):
        page.ddpg_conv2d_block(pixel_reach(4).observation_space.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page.ddpg_conv2d_block(pixel_reach(4).observation_space.shape, ignore_warning=True)
