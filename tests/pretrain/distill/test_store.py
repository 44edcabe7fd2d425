"""The teacher store: stored answers are the live ones, to the stated error; another store is refused."""

import json
from pathlib import Path

import pytest
import ranks
import torch
import webdataset

from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.pretrain import store
from halfseen.pretrain.distill import store as answers
from halfseen.pretrain.distill import train
from halfseen.pretrain.distill.config import Distill
from halfseen.recipes import load
from halfseen.tools import teach

OPTIONS = [
    *("model.width=32", "model.depth=4", "model.heads=2", "model.patch=16", "model.drop_path=0", "engine.device=cpu"),
    *("model.class_token=false", "model.distillation_token=false", "task.pool=norm_mean", "engine.ema=0"),
    *("data.train=embedded:emoji/train", "data.val=null", "data.label=folder", "data.classes=12", "data.image_size=32"),
    *("data.workers=0", "run.global_batch=32", "run.images=512", "run.log_every=32", "optim.warmup=0"),
    *("optim.base_lr=null", "optim.lr=1e-3", "teacher.source=timm:test_vit", "teacher.weights=random"),
    *("teacher.classes=12", "teacher.precision=fp32", "store.shard_images=256"),
    *("distillation.scores=soft_ce", "distillation.share=1", "distillation.attention=1", "distillation.hidden=0.1"),
    *("distillation.student_layers=[1,3]", "distillation.teacher_layers=[2,5]"),
]


def config(*overrides):
    return load(Distill, None, [*OPTIONS, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of 512 positions in two shards."""
    place = tmp_path_factory.mktemp("store") / "answers"
    recipe = place.parent / "recipe.yaml"
    recipe.write_text("")
    assert teach.main([str(recipe), *OPTIONS, f"store.folder={place}"]) == 0
    return place


def losses(settings, tmp_path, steps=6):
    made = train.parts(settings, World(), tmp_path)
    engine, stream, found = made.engine(settings, World(), fresh=True), made.stream(0), []
    for position in range(0, 32 * steps, 32):
        scalars = engine.step([made.prepare(next(stream))], made.schedule(settings).rate(position), position)
        found.append({name: float(value) for name, value in scalars.items()})
    return found


def test_training_from_the_store_follows_live_distillation(folder, tmp_path, capsys):
    live, stored = losses(config(), tmp_path), losses(config(f"store.folder={folder}"), tmp_path)
    assert "parameters" in capsys.readouterr().out  # of the live teacher, printed once
    for ours, theirs in zip(stored, live):
        for term in ("loss", "loss_scores", "loss_attention", "loss_hidden"):
            assert ours[term] == pytest.approx(theirs[term], rel=2e-3), term
    assert stored != live  # int8 cannot be exact: the numbers are really read from the store


def test_the_stored_answer_is_the_live_one_to_the_stated_error(folder, tmp_path):
    settings = config()
    made = train.parts(settings, World(), tmp_path)
    batch = next(made.stream(256))
    answer = made.prepare(batch)
    stored = answers.Stored(folder, answers.block_of(settings), answers.span_of(settings), 12, torch.device("cpu"))
    kept = stored(batch["position"], batch["key"])
    bound = stored.shard(256).errors(0)
    lost = answers.losses_of(answer, kept)
    assert lost.keys() == bound.keys() == {"scores", "qkv0", "qkv1", "hidden0", "hidden1"}
    assert all(0 < lost[name] <= bound[name] * 1.01 for name in lost)
    assert bound["qkv0"] < 0.5 / 127 * 1.01
    assert bound["scores"] < 1e-3


def test_a_shard_is_a_webdataset_of_blocks(folder):
    samples = list(webdataset.WebDataset(str(folder / store.shard_name(256)), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000000256"]
    assert {"key.npy", "scores.value.npy", "scores.class.npy", "qkv0.npy", "qkv0.scale.npy"} <= set(samples[0])


def test_what_is_there_is_not_made_again_and_the_rest_is(folder, tmp_path, capsys):
    place = tmp_path / "answers"
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    whole = (place / store.shard_name(256)).read_bytes()
    (place / store.shard_name(256)).unlink()
    before = (place / store.shard_name(0)).stat().st_mtime_ns
    (tmp_path / "recipe.yaml").write_text("")
    assert teach.main([str(tmp_path / "recipe.yaml"), *OPTIONS, f"store.folder={place}"]) == 0
    printed = capsys.readouterr().out
    assert store.shard_name(256) in printed
    assert f"{store.shard_name(0)}  " not in printed
    assert (place / store.shard_name(0)).stat().st_mtime_ns == before
    assert (place / store.shard_name(256)).read_bytes() == whole


def make_part(world, place):
    (Path(place).parent / f"{world.rank}.yaml").write_text("")
    settings = config(f"store.folder={place}")
    train_set = train.data.open_set(settings.data, "train")
    if world.main:
        store.create(Path(place), answers.describe(settings, train_set))  # the digest may be unknown
    world.barrier()
    asked = teach.Teacher(settings, train_set, train.live_teacher(settings, world), world)
    teach.teach(asked, 512, world)


def test_two_ranks_make_the_store_that_one_makes(folder, tmp_path):
    ranks.run(make_part, 2, str(tmp_path / "answers"))
    for first in (0, 256):
        name = store.shard_name(first)
        one, two = store.Shard(folder / name).block(0), store.Shard(tmp_path / "answers" / name).block(0)
        assert one.keys() == two.keys()
        assert all((abs(one[key].astype(float) - two[key].astype(float)).max() <= 1) for key in one)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.seed=1", "store.folder"),
        ("augment.erase=0.5", "augment.erase"),
        ("data.repeats=1", "data.repeats"),
        ("data.limit=500", "store.folder"),
        ("teacher.precision=bf16", "teacher.precision"),
        ("teacher.source=timm:test_vit2", "teacher.source"),
        ("distillation.teacher_layers=[1,5]", "distillation.teacher_layers"),
        ("task.mix_stride=8", "task.mix_stride"),
        ("store.top=3", "store.top"),
    ],
)
def test_a_store_of_other_answers_is_refused_by_name(folder, tmp_path, override, key):
    with pytest.raises(ConfigError) as refused:
        train.parts(config(f"store.folder={folder}", override), World(), tmp_path)
    assert refused.value.key == key


def test_a_teacher_of_other_weights_is_refused_where_it_is_loaded(folder, tmp_path, monkeypatch):
    options = [f"store.folder={folder}", "store.missing=live"]
    train.parts(config(*options), World(), tmp_path)
    monkeypatch.setattr(train.stage, "seed_weights", lambda seed: torch.manual_seed(seed + 1))  # of a random teacher
    with pytest.raises(ConfigError) as refused:
        train.parts(config(*options), World(), tmp_path)
    assert refused.value.key == "teacher.digest"


def test_what_does_not_shape_the_answers_may_differ(folder, tmp_path):
    other = ["optim.lr=1e-2", "model.share=2", "distillation.temperature=2", "task.smoothing=0"]
    train.parts(config(f"store.folder={folder}", *other), World(), tmp_path)


def test_a_missing_shard_stops_the_run_at_its_start_or_is_asked_live(folder, tmp_path):
    longer = ["run.images=1024", f"store.folder={folder}"]
    with pytest.raises(ConfigError, match="positions-000000000512"):
        train.parts(config(*longer), World(), tmp_path)
    made = train.parts(config(*longer, "store.missing=live"), World(), tmp_path)
    exact = train.parts(config("run.images=1024"), World(), tmp_path)
    for start, same in ((0, False), (512, True)):
        ours, theirs = (parts.prepare(next(parts.stream(start)))["teacher_hidden"][0] for parts in (made, exact))
        assert torch.equal(ours, theirs) is same


def test_a_store_shorter_than_the_run_shows_its_views_again_when_asked_to(folder, tmp_path):
    """Positions from 512 on are those from 0 on: samples, crops, erasing, mixing, answers; also after a resume."""
    settings = config(f"store.folder={folder}", "run.images=1600", "store.images=512", "store.repeat=true")
    made = train.parts(settings, World(), tmp_path)
    stream = made.stream(0)
    batches = [made.prepare(next(stream)) for _ in range(34)]
    for later, earlier in ((16, 0), (17, 1), (33, 1)):
        for name in ("image", "target", "teacher_logits"):
            assert torch.equal(batches[later][name], batches[earlier][name])
    assert not torch.equal(batches[1]["image"], batches[0]["image"])
    assert made.reads(settings)(0, 33 * 32, 0) == made.reads(settings)(0, 32, 0) != made.reads(settings)(0, 64, 0)
    resumed = made.prepare(next(made.stream(33 * 32)))
    assert torch.equal(resumed["image"], batches[33]["image"])


def test_repeating_needs_to_know_after_how_many_images(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"store\.repeat=true store\.images="):
        train.parts(config(f"store.folder={folder}", "run.images=1600", "store.images=512"), World(), tmp_path)
    with pytest.raises(ConfigError, match="after how many"):
        config(f"store.folder={folder}", "store.repeat=true")


def test_another_sample_at_a_position_is_noticed(folder, tmp_path):
    made = train.parts(config(f"store.folder={folder}"), World(), tmp_path)
    batch = next(made.stream(0))
    batch["key"][3] = "another"
    with pytest.raises(ConfigError, match="position 3 held another sample"):
        made.prepare(batch)


def test_the_audit_finds_answers_that_are_not_the_teachers(folder, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("")
    arguments = [str(tmp_path / "recipe.yaml"), *OPTIONS, "--audit", "2"]
    assert teach.main([*arguments, f"store.folder={folder}"]) == 0
    assert "2 of 2 blocks looked at, 0 wrong" in capsys.readouterr().out
    place = tmp_path / "answers"
    place.mkdir()
    (place / store.DESCRIPTION).write_bytes((folder / store.DESCRIPTION).read_bytes())
    for first, other in ((0, 256), (256, 0)):  # each shard under the other's name
        (place / store.shard_name(first)).write_bytes((folder / store.shard_name(other)).read_bytes())
    assert teach.main([*arguments, f"store.folder={place}"]) == 1


@pytest.mark.parametrize("top", [0, 3])
def test_the_highest_scores_are_kept_and_the_rest_keeps_its_mass(top):
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * 3
    cfg = answers.Answers(top=top)
    packed = answers.packed({"teacher_logits": logits}, cfg, 5)
    arrays = {name: torch.from_numpy(array) for name, array in packed.items()}
    found = answers.unpacked(arrays, 12)["teacher_logits"]
    kept = logits.topk(top or 12).indices
    torch.testing.assert_close(found.gather(1, kept), logits.gather(1, kept), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.logsumexp(1), logits.logsumexp(1), rtol=1e-3, atol=2e-3)
    assert arrays["scores.class"].dtype == torch.int16


def test_windows_come_back_in_their_order():
    tokens = torch.randn(2 * 4, 9, 6, generator=torch.Generator().manual_seed(0))
    arrays = answers.packed({"teacher_qkv": [tokens]}, answers.Answers(tokens="fp16"), 2)
    rows = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert rows["qkv0"].shape == (2, 4, 9, 6)
    torch.testing.assert_close(answers.unpacked(rows, 0)["teacher_qkv"][0], tokens, rtol=1e-3, atol=1e-3)


def test_the_description_is_plain_and_names_what_counts(folder):
    described = json.loads((folder / store.DESCRIPTION).read_text())
    assert described["teacher.source"] == "timm:test_vit"
    assert described["distillation.teacher_layers"] == {"qkv": [2, 5], "hidden": [2, 5]}
