"""Videos play: decoded again they have as many frames, which move; a page that holds one needs no other file."""
import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import fastrl_pipes.agents.ddpg as page
from fastrl_pipes.core import SimpleStep
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.learner.film import film
from fastrl_pipes.loggers.video import Video, VideoCollector

av = pytest.importorskip("av", reason="PyAV is the extra `video`")


def walking(n=24, height=48, width=64):
    frames = np.full((n, height, width, 3), 30, np.uint8)
    for i in range(n):
        frames[i, 8:32, 2 * i % (width - 12):2 * i % (width - 12) + 12] = 255, 8 * i % 256, 0
    return frames


def decoded(data):
    "Frames of an MP4 or a GIF, and its length in seconds"
    if data[:3] == b"GIF":
        with Image.open(io.BytesIO(data)) as gif:
            frames, seconds = [], 0.0
            for i in range(gif.n_frames):
                gif.seek(i)
                seconds += gif.info["duration"] / 1000
                frames.append(np.asarray(gif.convert("RGB")))
            return frames, seconds
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p", "what every browser plays"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, float(stream.duration * stream.time_base)


def apart(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


@pytest.mark.parametrize("fmt", ["mp4", "gif"])
def test_the_file_plays(tmp_path, fmt):
    frames = walking()
    path = Video(frames, fps=10).save(tmp_path / "deep" / f"walk.{fmt}")
    back, seconds = decoded(path.read_bytes())
    assert len(back) == len(frames) and seconds == pytest.approx(2.4, abs=0.01)
    assert all(apart(a, b) < 6 for a, b in zip(back, frames)) and apart(back[0], back[-1]) > 6


@pytest.mark.parametrize("shape", [(33, 47, 3), (32, 48), (400, 600, 3)])
def test_odd_gray_and_large_frames(shape):
    frames = [np.full(shape, 20 * i, np.uint8) for i in range(9)]
    back, _ = decoded(Video(frames).encoded("mp4"))
    assert len(back) == 9 and back[0].shape == (shape[0] // 2 * 2, shape[1] // 2 * 2, 3) and apart(back[8], back[0]) > 100


@pytest.mark.parametrize("fmt", ["mp4", "gif"])
def test_one_frame_is_a_video_too(fmt):
    assert len(decoded(Video(walking(1)).encoded(fmt))[0]) == 1


def test_frames_that_stand_still_last_as_long():
    frames = [np.zeros((16, 16, 3), np.uint8)] * 5 + [np.full((16, 16, 3), 200, np.uint8)] * 5
    assert len(decoded(Video(frames, fps=10).encoded("mp4"))[0]) == 10
    back, seconds = decoded(Video(frames, fps=10).encoded("gif"))
    assert len(back) == 2 and seconds == pytest.approx(1.0)


class Sources(HTMLParser):
    "The media that a page would play"

    def __init__(self, text):
        super().__init__()
        self.video, self.media = {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "video":
            self.video = attrs
        if tag in ("source", "img"):
            self.media.append((attrs.get("type"), attrs["src"]))


def test_the_notebook_output_holds_a_playable_video():
    frames = walking()
    found = Sources(Video(frames, fps=10, fmt="mp4", title="a walk")._repr_html_())
    assert {"controls", "autoplay", "loop", "muted", "playsinline"} <= set(found.video), "autoplay needs muted"
    (kind, src), = found.media
    assert kind == "video/mp4" and src.startswith("data:video/mp4;base64,")
    assert len(decoded(base64.b64decode(src.split(",", 1)[1]))[0]) == len(frames)
    (_, src), = Sources(Video(frames, fmt="gif").html()).media
    assert src.startswith("data:image/gif;base64,") and len(decoded(base64.b64decode(src.split(",", 1)[1]))[0]) == len(frames)


def test_what_is_no_video_is_named(tmp_path):
    for frames, said in (([], "include_images"), ([np.zeros((8, 8, 3))], "uint8"), ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "one shape"),
                         ([np.zeros((8, 8, 4), np.uint8)], "uint8")):
        with pytest.raises(ValueError, match=said):
            Video(frames)
    with pytest.raises(LookupError, match="gif"):
        Video(walking()).save(tmp_path / "walk.avi")
    with pytest.raises(ValueError, match="fps"):
        Video(walking(), fps=0)
    assert not list(tmp_path.iterdir())


def test_without_pyav_there_is_gif_and_a_hint(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("fastrl_pipes.loggers.video.find_spec", lambda name: None)
    video = Video(walking())
    assert video.fmt == "gif" and video.save(tmp_path / "walk.gif").stat().st_size > 0
    with pytest.raises(ValueError, match=r"fastrl_pipes\[video\]"):
        video.save(tmp_path / "walk.mp4")


# --- episodes --------------------------------------------------------------------------------------------------------
def test_the_collector_keeps_one_environment_and_one_episode():
    image = np.arange(12, dtype=np.uint8)[:, None, None, None, None] * np.ones((12, 2, 4, 4, 3), np.uint8)
    image[:, 1] = 99
    ends = np.zeros((12, 2, 1), bool)
    ends[4, 0] = ends[6, 1] = True
    flags = np.zeros((2, 1), bool)
    steps = [SimpleStep(reward=np.ones((2, 1)), terminated=ends[t], truncated=flags, env_id=np.arange(2)[:, None], image=image[t]) for t in range(12)]
    pipe = VideoCollector(steps[:5])
    assert len(list(pipe)) == 5 and [f[0, 0, 0] for f in pipe.images] == [0, 1, 2, 3, 4] and pipe.total == 5
    pipe = VideoCollector(steps, frames=3)
    assert len(list(pipe)) == 12 and [f[0, 0, 0] for f in pipe.images] == [5, 6, 7] and pipe.total == 7, "the latest episode's first frames"
    with pytest.raises(ValueError, match="include_images"):
        VideoCollector([]).video()


def test_a_film_shows_the_first_validation_episode(tmp_path):
    actor = page.Actor(3, 1, 8, 8)
    learner = page.DDPGLearner(actor, page.Critic(3, 1, 8, 8), page.GymStepper("Pendulum-v1", page.DDPGAgent(actor), seed=0), [], bs=8)
    found = learner.validate(episodes=1, show=True)
    video = found["video"]
    assert len(video) == found["lengths"][0] == 200 and video.fps == 30 and apart(video.frames[0], video.frames[-1]) > 0
    assert float(re.search(r"-?[\d.]+", video.title)[0]) == pytest.approx(found["returns"][0], abs=0.1)
    back, _ = decoded(video.save(tmp_path / "episode.mp4").read_bytes())
    assert len(back) == 200 and apart(back[0], video.frames[0]) < 4
    assert len(film(learner, frames=7, fps=5)) == 7


def test_an_environment_that_cannot_render_says_so():
    actor = page.Actor(2, 1, 8, 8)
    learner = page.DDPGLearner(actor, page.Critic(2, 1, 8, 8), page.GymStepper(Goal, page.DDPGAgent(actor), seed=0), [], bs=8)
    with pytest.raises(ValueError, match="rgb_array"):
        learner.validate(episodes=1, show=True)


@pytest.mark.slow
def test_a_browser_plays_it(tmp_path):
    "Headless Chromium loads a page that holds the video and reports how far it got"
    from shutil import which
    if not (browser := which("chromium")):
        pytest.skip("needs chromium")
    page_text = Video(walking(60, 96, 128), fps=30, fmt="mp4").html() + """<script>
        const v = document.querySelector('video');
        setTimeout(() => { document.title = [v.videoWidth, v.videoHeight, v.error ? v.error.message : 'fine', v.currentTime > 0.2].join(' '); }, 1500);
        </script>"""
    (tmp_path / "page.html").write_text(page_text)
    out = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--virtual-time-budget=4000",
                          f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=60).stdout
    assert "<title>128 96 fine true</title>" in out
