"""Recovery: a pruned model learns from the unpruned one, and can be killed at any moment."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from test_captioned import write

from checkpoints import stable_diffusion, text_model, tiny_checkpoint
from examples.scenes import world
from examples.scenes.recover import main as on_scenes
from examples.scenes.world import SceneWorld
from export.checkpoint import open_checkpoint
from export.prune import prune_checkpoint
from export.repository import SOURCE, load_parts
from export.vqgan_decoder import Decoder
from networks.pruned import pruning_of
from training import run as run_module
from training.captioned import Captioned
from training.latents import encoded
from training.loop import Trainer
from training.preparation import Preparation
from training.recover import Teacher, command, recover

main = command()
Run = partial(run_module.Run, source=SceneWorld())
RATIOS = {"clip_text": 0.25, "bert": 0.25, "unet": 0.3, "vqgan_decoder": 0.25}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A tiny checkpoint whose UNet takes the guidance scale."""
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher") / "teacher", timestep_cond=16)


@pytest.fixture(scope="module")
def pruned(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "pruned"
    prune_checkpoint(open_checkpoint(teacher), RATIOS, folder)
    return folder


@pytest.fixture
def copy(pruned, tmp_path, monkeypatch) -> Path:
    """A copy of the pruned checkpoint to train, on few scenes."""
    monkeypatch.setattr(world, "SCENES", 100)
    return Path(shutil.copytree(pruned, tmp_path / "student"))


def killed(trainer: Trainer, position: dict | None, save=Trainer._save) -> None:
    """A save, after which the run ends where it has steps left."""
    save(trainer, position)
    if trainer.step < trainer.steps:
        raise KeyboardInterrupt


@pytest.mark.parametrize("model", RATIOS)
def test_recovery_lowers_the_distillation_error(teacher, copy, tmp_path, model):
    runs = tmp_path / "runs"
    ((name, (before, after)),) = recover(Run(copy, runs, 30, 8), teacher, [model]).items()
    assert name == model
    assert after < 0.9 * before
    opened, taught = open_checkpoint(copy), Teacher(open_checkpoint(teacher))
    inputs = taught.inputs(model, taught.batches(Run(copy, runs, 1, 8), model).at(10**6), 10**6)
    with torch.no_grad():
        on_disk = taught.error(load_parts(opened)[model], inputs).item()
    assert on_disk == pytest.approx(after, rel=1e-5)


def test_recovery_changes_what_was_named_and_keeps_its_shape(teacher, copy, pruned, tmp_path):
    recover(Run(copy, tmp_path / "runs", 1, 4), teacher, ["bert"])
    for part in SOURCE.values():
        assert pruning_of(copy / part) == pruning_of(pruned / part)
        (mine,), (theirs,) = ((f / part).glob("*.safetensors") for f in (copy, pruned))
        assert (mine.read_bytes() == theirs.read_bytes()) == (part != "bert")


def test_a_recovery_that_was_killed_goes_on(teacher, copy, pruned, tmp_path, monkeypatch):
    whole = recover(Run(copy, tmp_path / "whole", 6, 4), teacher, ["clip_text"])
    again = Path(shutil.copytree(pruned, tmp_path / "again" / "student"))
    monkeypatch.setattr(Trainer, "_save", killed)
    run = Run(again, tmp_path / "killed", 6, 4, save_every=2)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recover(run, teacher, ["clip_text"])
    resumed = recover(run, teacher, ["clip_text"])
    assert resumed["clip_text"][1] == whole["clip_text"][1]


def test_several_models_go_on_from_where_they_were_killed(teacher, copy, tmp_path, monkeypatch):
    run = Run(copy, tmp_path / "runs", 2, 4)
    with monkeypatch.context() as patched:
        train = Trainer.run

        def killed(trainer, loss_at, batches):
            if "bert" in trainer.folder.name:
                raise KeyboardInterrupt
            return train(trainer, loss_at, batches)

        patched.setattr(Trainer, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            recover(run, teacher, ["clip_text", "bert"])
    recover(run, teacher, ["clip_text", "bert"])
    assert len(list(run.runs.glob("recover-*"))) == 2


def test_inputs_of_a_step_never_change(teacher, copy, tmp_path):
    run = Run(copy, tmp_path / "runs", 1, 4)
    taught = [Teacher(open_checkpoint(teacher)) for _ in range(2)]
    for model in RATIOS:
        first, second = (t.inputs(model, t.batches(run, model).at(5), 5) for t in taught)
        assert first.keys() == taught[0].parts[model].inputs.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_teacher_gets_the_text_model_that_its_export_got(teacher, copy, tmp_path):
    without = Path(shutil.copytree(teacher, tmp_path / "without"))
    bert = (without / "bert").rename(tmp_path / "bert")
    for file in (without / "bert_tokenizer").iterdir():
        file.rename(bert / file.name)
    index = json.loads((without / "model_index.json").read_text())
    del index["bert"], index["bert_tokenizer"]
    (without / "model_index.json").write_text(json.dumps(index))
    run = Run(copy, tmp_path / "runs", 1, 4)
    assert recover(run, without, ["bert"], str(bert)).keys() == {"bert"}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> tuple[Path, str, Path]:
    """A distilled Stable Diffusion, a text model for it, and the two pruned."""
    folder = tmp_path_factory.mktemp("foreign")
    whole = stable_diffusion(folder / "lcm", distilled=True)
    bert = str(text_model(folder / "bert", "bert"))
    prune_checkpoint(open_checkpoint(whole, bert), RATIOS, folder / "pruned")
    return whole, bert, folder / "pruned"


@pytest.mark.parametrize(
    "model",
    ["vqgan_decoder",
     *(pytest.param(name, marks=pytest.mark.slow) for name in ("unet", "clip_text", "bert"))],
)  # fmt: skip
def test_a_checkpoint_of_another_world_learns_from_its_own_pictures(
    foreign, tmp_path, monkeypatch, capsys, model
):
    whole, bert, pruned = foreign
    student = Path(shutil.copytree(pruned, tmp_path / "student"))
    pictures, runs = write("jsonl", tmp_path / "pictures"), tmp_path / "runs"
    given = {"bert": bert, "models": model, "batch": 4, "device": "cpu"}
    with pytest.raises(SystemExit, match="error: --data is required: a folder of pictures"):
        main(student, whole, runs=runs, steps=1, **given)
    with monkeypatch.context() as patched:
        patched.setattr(world, "draw_scenes", None)  # refused before scenes are drawn
        with pytest.raises(
            SystemExit, match=r"error: --data: lcm, whose vae is an AutoencoderKL, kno"
        ):
            on_scenes(student, whole, runs=runs, steps=1, **given)
    main(student, whole, runs=runs, steps=40, path=pictures, **given)
    said = capsys.readouterr().out
    before, after = json.loads(said.splitlines()[-1])[model]
    assert after < 0.9 * before
    read = any("broken" in line for line in said.splitlines() if line.startswith("recover-"))
    assert read == (model in ("unet", "vqgan_decoder"))  # others learn from captions alone

    again = Path(shutil.copytree(pruned, tmp_path / "again"))
    source = Captioned(pictures, Preparation(32))
    run = Run(again, tmp_path / "killed", 40, 4, source=source, save_every=20)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            recover(run, whole, [model], bert)
    resumed = recover(run, whole, [model], bert)
    assert resumed[model][1] == after


def test_latents_are_encoded_as_the_served_decoder_takes_them():
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8,),
                        scaling_factor=0.3, shift_factor=0.2).eval()  # fmt: skip
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encoded(vae, pictures)
    with torch.no_grad():
        wanted = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
        torch.testing.assert_close(Decoder(vae, 0.3, 0.2)(latents), wanted, rtol=1e-4, atol=1e-4)


def test_guidance_is_taught_up_to_twice_what_requests_have(foreign, teacher):
    for whole, bert, most in ((foreign[0], foreign[1], 16), (teacher, None, 6)):
        assert Teacher(open_checkpoint(whole, bert))._most_guidance == most


def test_a_checkpoint_that_is_whole_has_nothing_to_recover(teacher, tmp_path):
    with pytest.raises(ValueError, match="teacher has no pruned model to recover"):
        recover(Run(teacher, tmp_path, 1, 4), teacher)


@pytest.mark.parametrize("model", ["fusion", "unet2"])
def test_a_model_that_is_not_pruned_is_named(teacher, copy, tmp_path, model):
    with pytest.raises(ValueError, match=f"--models '{model}' is not pruned: clip_text, bert"):
        recover(Run(copy, tmp_path, 1, 4), teacher, [model])


def test_a_pruned_teacher_is_refused(copy, pruned, tmp_path):
    with pytest.raises(ValueError, match="--teacher pruned: its clip_text is pruned too"):
        recover(Run(copy, tmp_path, 1, 4), pruned)


def test_another_pruning_does_not_go_on_from_the_save_of_the_first(teacher, copy, tmp_path):
    recover(Run(copy, tmp_path / "runs", 1, 4), teacher, ["clip_text"])
    other = tmp_path / "other" / copy.name
    other.parent.mkdir()
    prune_checkpoint(open_checkpoint(teacher), {"clip_text": 0.4}, other)
    recover(Run(other, tmp_path / "runs", 1, 4), teacher, ["clip_text"])
    assert pruning_of(other / "text_encoder").ratio == 0.4
    assert len([*(tmp_path / "runs").glob("recover-clip_text-*")]) == 2
