"""The order in which samples are met, batches of them, and what happens to those that cannot be used."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import SPEC
from footage import damaged, odd_files, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import LIMIT, ROOT

import sd
from clips.encode import encode
from clips.encoded import EncodedClips
from clips.samples import LiveClips, Sample
from data import Batch, Faults, Stream, batches, shuffled

MIX = {"video": 2, "label": 1, "caption": 1}


def stream(clips, **options):
    return Stream(clips, **{"mix": MIX, "batch_size": 4, "seed": 3} | options)


# ---------------------------------------------------------------------------------------------------------------------
# The order of samples


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 9))
def test_an_epoch_is_a_permutation(n, seed):
    order = shuffled(n, seed, 0, 1).tolist()
    assert sorted(order) == list(range(n))
    if n > 20:
        assert all(order != shuffled(n, *key).tolist() for key in ((seed + 1, 0, 1), (seed, 1, 1), (seed, 0, 2)))
    shuffled.cache_clear()
    assert shuffled(n, seed, 0, 1).tolist() == order


def test_permutations_are_even():
    """Where an item lands, over many seeds: chi-square of 16 places with 15 degrees of freedom."""
    counts = np.bincount([shuffled(16, seed, 0, 0)[5] for seed in range(1600)], minlength=16)
    assert ((counts - 100) ** 2 / 100).sum() < 45  # exceeded once in 10,000 when even


def test_batches_have_the_mix_and_the_condition(encoded):
    batch = stream(EncodedClips(encoded), drop_caption=0.0).batch(0)
    latents = batch.latents(None, 0.5, 4)
    assert latents.shape == (4, 4, 4, 4, 4)
    assert batch.sources == ["video", "video", "label", "caption"]
    assert batch.fps[2:].tolist() == [0, 120] and all(f in (4, 8) for f in batch.fps[:2].tolist())
    assert (latents[3] == latents[3, :1]).all()  # one image, repeated
    assert (latents[2, 0] != latents[2, 1]).any()
    assert all(batch.captions) and batch.captions == [sample.caption for sample in batch.samples]


def test_an_epoch_meets_every_item_once(encoded):
    s = stream(EncodedClips(encoded))
    met = [s.item_at(4 * turn + slot) for turn in range(4) for slot in (0, 1)]
    assert sorted(met) == [("video", i) for i in range(8)]
    again = [s.item_at(4 * turn + slot) for turn in range(4, 8) for slot in (0, 1)]
    assert sorted(again) == sorted(met) and again != met


def test_ranks_share_the_stream(encoded):
    """Two ranks with batches of 4 meet together what one rank with a batch of 8 meets."""
    clips = EncodedClips(encoded)
    whole = stream(clips, batch_size=8, drop_caption=0.0).batch(5)
    parts = [stream(clips, rank=r, world=2, drop_caption=0.0).batch(5) for r in (0, 1)]
    assert parts[0].captions + parts[1].captions == whole.captions
    assert torch.cat([parts[0].fps, parts[1].fps]).tolist() == whole.fps.tolist()


def test_a_batch_is_a_function_of_its_number(encoded):
    def latents(batch):
        return batch.latents(None, 1.0, 4)

    clips = EncodedClips(encoded)
    s = stream(clips)
    late = s.batch(100)
    for _ in range(3):
        s.batch(7)
    fresh = stream(clips).batch(100)
    assert torch.equal(latents(late), latents(fresh)) and late.captions == fresh.captions
    assert not torch.equal(latents(late), latents(stream(clips, seed=4).batch(100)))


@pytest.mark.parametrize("kind", ["encoded", "live"])
def test_workers_change_nothing(encoded, lists, micro, kind):
    """Batches read ahead by processes, from the middle of an epoch, are the same in the same order."""
    s = stream(EncodedClips(encoded) if kind == "encoded" else LiveClips(lists, SPEC))
    vae = sd.load(micro).vae
    for one, two in zip(batches(s, 3, 9, workers=2), batches(s, 3, 9, workers=0), strict=True):
        assert (one.captions, one.sources, one.fps.tolist()) == (two.captions, two.sources, two.fps.tolist())
        assert torch.equal(one.latents(vae, 1.0, 4), two.latents(vae, 1.0, 4))


def test_batches_are_the_same_live_and_encoded_ahead(lists, micro, tmp_path):
    model, out = sd.load(micro), str(tmp_path / "clips")
    encode(model, lists, out, SPEC, text=True, dtype=torch.float32)
    ahead, live = (stream(clips, drop_caption=0.5) for clips in (EncodedClips(out), LiveClips(lists, SPEC)))
    for n in (0, 7):
        one, two = ahead.batch(n), live.batch(n)
        assert (one.captions, one.sources, one.fps.tolist()) == (two.captions, two.sources, two.fps.tolist())
        torch.testing.assert_close(one.latents(None, 0.5, 4), two.latents(model.vae, 0.5, 4), atol=1e-6, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(one.context, model.text(model.text.tokenize(two.captions)[0]))
        assert two.context is None and "" in one.captions + ahead.batch(1).captions


def test_captions_are_dropped_at_the_stated_rate(encoded):
    s = stream(EncodedClips(encoded), drop_caption=0.3)
    dropped = np.mean([caption == "" for n in range(150) for caption in s.batch(n).captions])
    assert abs(dropped - 0.3) < 0.06


def test_latents_are_scaled_posterior_samples():
    """Over many draws of one sample mean and deviation are those of the posterior, times the scale."""
    moments = torch.zeros(1, 8, 4, 4)
    moments[:, :4], moments[:, 4:] = 3.0, 2 * np.log(0.2)
    sample = Sample(moments, "", 120, 0)
    draws = torch.cat([Batch([sample], [""], ["caption"], None, 0, [i], None, []).latents(None, 0.5, 1)
                       for i in range(400)])
    assert abs(draws.mean() - 1.5) < 0.01 and abs(draws.std() - 0.1) < 0.01
    batch = Batch([sample], [""], ["caption"], None, 0, [0], None, [])
    assert torch.equal(batch.latents(None, 0.5, 2, draw=False), torch.full((1, 2, 4, 4, 4), 1.5))


def test_a_mix_without_samples_is_refused(lists, tmp_path):
    with pytest.raises(ValueError, match="label"):
        stream(LiveClips({"video": lists["video"], "caption": lists["caption"]}, SPEC))
    with pytest.raises(ValueError, match="not a folder of encoded clips"):
        EncodedClips(str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be used


def test_a_bad_sample_gives_way_to_another(bad_lists, lists, micro, tmp_path):
    """It is skipped, and all others are as before; the same one replaces it live and encoded ahead."""
    out = str(tmp_path / "clips")
    encode(sd.load(micro), bad_lists, out, SPEC, dtype=torch.float32)
    good, live, ahead = (stream(clips, batch_size=8) for clips in
                         (LiveClips(lists, SPEC), LiveClips(bad_lists, SPEC), EncodedClips(out)))
    faults = []
    for n in range(8):
        one, two, three = good.batch(n), live.batch(n), ahead.batch(n)
        assert two.faults == three.faults and two.captions == three.captions
        changed = [i for i in range(8) if not torch.equal(one.samples[i].data, two.samples[i].data)]
        assert all(one.sources[i] == "caption" for i in changed) and len(changed) <= len(two.faults)
        faults += two.faults
    assert set(faults) == {("caption", str(tmp_path / "missing.png"), "missing"),
                           ("caption", str(tmp_path / "broken.png"), "not an image that can be read")}


def test_a_stream_over_damaged_videos_goes_on(tmp_path):
    """Half of the files are damaged in every way there is, workers read: batches are whole, every fault has a name."""
    (tmp_path / "good").mkdir()
    write_clip(tmp_path / "good" / "0.mp4", range(0, 1200, 20))
    for n in range(1, 40):
        os.link(tmp_path / "good" / "0.mp4", tmp_path / "good" / f"{n}.mp4")
    paths = sorted((tmp_path / "good").iterdir())
    odd = odd_files(tmp_path, paths[0])
    bad = [*odd, *damaged(tmp_path, paths[:1], 30)]
    paths += bad
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"path": str(p), "caption": "x"}) + "\n" for p in paths))
    s = stream(LiveClips({"video": str(tmp_path / "list.jsonl")}, SPEC), mix={"video": 1}, batch_size=10)
    faults = []
    for batch in batches(s, 0, 2 * len(paths) // 10, workers=2):
        assert [sample.data.shape for sample in batch.samples] == [(4, 3, 32, 32)] * 10
        faults += batch.faults
    named = {name for _, name, _ in faults}
    assert set(map(str, odd)) <= named <= {str(path) for path in bad}
    assert all(reason for *_, reason in faults)


def test_faults_are_named_once_and_end_the_run_when_they_are_many(bad_lists, capsys):
    s, faults = stream(LiveClips(bad_lists, SPEC), mix={"caption": 1}, batch_size=8), Faults(0.5)
    for n in range(20):
        batch = s.batch(n)
        faults.add(len(batch.samples), batch.faults)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: skipped caption /") for line in lines)
    assert sorted(line.split("/")[-1] for line in lines) == ["broken.png: not an image that can be read",
                                                             "missing.png: missing"]
    assert faults.met == 160 + faults.bad and 20 < faults.bad < 80
    with pytest.raises(ValueError, match="more than max_bad = 0.1"):
        for n in range(20, 40):
            faults.share = 0.1
            batch = s.batch(n)
            faults.add(len(batch.samples), batch.faults)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_list_with_nothing_in_it_that_can_be_used_ends_in_one_line(tmp_path, workers):
    (tmp_path / "list.jsonl").write_text('{"path": "missing.png", "caption": "x"}\n')
    s = stream(LiveClips({"caption": str(tmp_path / "list.jsonl")}, SPEC), mix={"caption": 1})
    with pytest.raises(ValueError, match=r"a hundred caption samples in a row cannot be used.*missing\.png.*missing"):
        list(batches(s, 0, 3, workers))


class Broken(Stream):
    def batch(self, n):
        json.loads("no JSON")


def test_a_bug_in_a_worker_keeps_its_traceback(lists):
    s = Broken(LiveClips({"caption": lists["caption"]}, SPEC), {"caption": 1}, 4)
    with pytest.raises(RuntimeError, match='json.loads\\("no JSON"\\)'):
        list(batches(s, 0, 3, workers=1))


class Hanging(Stream):
    def batch(self, n):
        time.sleep(60)


def test_a_worker_that_hangs_is_an_error(lists):
    s = Hanging(LiveClips({"caption": lists["caption"]}, SPEC), {"caption": 1}, 4)
    with pytest.raises(ValueError, match="no batch within 1 s"):
        list(batches(s, 0, 3, workers=1, limit=1))


SIGNALLED = """
import os, signal, time
from data import batches

class Slow:
    def __getitem__(self, n):
        time.sleep(0.1)
        return n

if __name__ == "__main__":
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), lambda *_: None)
        for n in batches(Slow(), 0, 12, workers=2):
            if n == 1:  # both have begun
                os.killpg(0, getattr(signal, name))
        print(name, n)
"""


def test_workers_outlive_a_signal_to_all_processes(tmp_path):
    """As Ctrl-C is one, and the SIGTERM of torchrun: the one that trains still has to finish its step."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    done = subprocess.run([sys.executable, tmp_path / "signalled.py"], text=True, capture_output=True, timeout=LIMIT,
                          start_new_session=True, env=os.environ | {"PYTHONPATH": ROOT})
    assert done.stdout == "SIGTERM 11\nSIGINT 11\n", done.stderr
