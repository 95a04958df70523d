"""Every training stage for a few steps, and the formulas of distillation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from examples.scenes import align, decoder, reward, world
from examples.scenes.grounding import QUESTIONS
from examples.scenes.reward import faults
from examples.scenes.scenes import HELD_OUT, sample_scene
from examples.scenes.world import SceneWorld
from export.checkpoint import open_checkpoint
from training import bert, clip, data, diffusion, distill, run, vqgan, vqgan_losses
from training.loop import Trainer
from training.vqgan_losses import opponent, rgb
from twinbrush.engine.samplers import NoiseSchedule, ddim

Run = partial(run.Run, source=SceneWorld())
ALPHAS_CUMPROD = distill.ddim_scheduler().alphas_cumprod
T = torch.tensor([999, 549, 49])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, in_channels=8, out_channels=8, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
        **changes,
    ).eval()  # fmt: skip


def test_the_solver_of_distillation_is_ddim():
    reference = distill.ddim_scheduler()
    reference.set_timesteps(distill.SOLVER_STEPS)
    x, v = draw(3, 8, 4, 4), draw(3, 8, 4, 4, seed=1)
    before = T - 1000 // distill.SOLVER_STEPS
    assert before[-1] == -1
    ours = distill.ddim_step(x, v, T, before, ALPHAS_CUMPROD)
    for k, t in enumerate(T):
        theirs = reference.step(v[k], t, x[k]).prev_sample
        torch.testing.assert_close(ours[k], theirs, rtol=1e-4, atol=1e-4)
    led = distill.velocity(x, ours, T, before, ALPHAS_CUMPROD)
    torch.testing.assert_close(led, v, rtol=1e-3, atol=1e-3)


def test_a_step_of_the_served_sampler_is_a_phase_of_distillation():
    schedule = NoiseSchedule(
        tuple(ALPHAS_CUMPROD.tolist()), "v_prediction", timestep_spacing="trailing"
    )
    served = torch.from_numpy(ddim(schedule, distill.PHASES).timesteps).long()
    assert distill.end_of_phase(served).tolist() == [*served[1:].tolist(), -1]
    assert distill.end_of_phase(served - 1000 // distill.SOLVER_STEPS).tolist() == [
        749,
        499,
        249,
        -1,
    ]
    x, v = draw(4, 8, 4, 4), draw(4, 8, 4, 4, seed=1)
    ours = distill.ddim_step(x, v, served, distill.end_of_phase(served), ALPHAS_CUMPROD)
    for k, (a, b) in enumerate(ddim(schedule, distill.PHASES).table[:, :2]):
        torch.testing.assert_close(ours[k], a * x[k] + b * v[k], rtol=1e-4, atol=1e-4)


def test_at_the_end_of_a_phase_the_student_stays():
    ends = torch.tensor([749, 499, 249, -1])
    x, v = draw(4, 8, 4, 4), draw(4, 8, 4, 4, seed=1)
    there = distill.ddim_step(x, v, ends, ends, ALPHAS_CUMPROD)
    torch.testing.assert_close(there, x, rtol=1e-5, atol=1e-5)


def test_a_new_student_says_what_its_teacher_does_at_any_scale():
    teacher = tiny_unet()
    student = distill.new_student(teacher)
    x, hidden = draw(3, 8, 4, 4), draw(3, 5, 8)
    with torch.no_grad():
        theirs = teacher(x, T, encoder_hidden_states=hidden).sample
        ours = student(
            x, T, encoder_hidden_states=hidden, timestep_cond=draw(3, distill.EMBEDDING)
        ).sample
    torch.testing.assert_close(ours, theirs)


def test_a_student_starts_from_what_another_has_learnt(tmp_path):
    teacher = tiny_unet()
    learnt = tiny_unet(time_cond_proj_dim=distill.EMBEDDING)
    learnt.save_pretrained(tmp_path / "learnt" / "unet")
    student = distill.new_student(teacher, tmp_path / "learnt").state_dict()
    assert all(torch.equal(student[name], one) for name, one in learnt.state_dict().items())
    assert student.keys() == learnt.state_dict().keys()
    teacher.save_pretrained(tmp_path / "taught" / "unet")
    with pytest.raises(data.BadInput, match=r"--init: .*unet.* is no unet to start .*cond_proj"):
        distill.new_student(teacher, tmp_path / "taught")


def test_folded_colours_change_nothing():
    model = vqgan.build().eval()
    x = draw(2, 3, 64, 64)
    with torch.no_grad():
        latents = model.encode(opponent(x)).latents
        pictures = rgb(model.decoder(model.post_quant_conv(latents)))
        vqgan.fold_colours(model)
        torch.testing.assert_close(model.encode(x).latents, latents, rtol=1e-3, atol=1e-3)
        decoded = model.decoder(model.post_quant_conv(latents))
    torch.testing.assert_close(decoded, pictures, rtol=1e-3, atol=1e-3)


def test_a_judge_and_what_it_judges_learn_apart():
    judge = vqgan_losses.Discriminator()
    y = draw(2, 3, 32, 32).requires_grad_()
    fooling, judging = vqgan_losses.hinge(judge, y, draw(2, 3, 32, 32, seed=1))
    fooling.backward(retain_graph=True)
    assert y.grad.abs().sum() > 0
    assert all(p.grad is None for p in judge.parameters())
    y.grad = None
    judging.backward()
    assert y.grad is None
    assert all(p.grad is not None for p in judge.parameters())


def test_the_adaptive_weight_makes_both_gradients_equal():
    last = draw(4).requires_grad_()
    loss, fooling = (7 * last).sum(), (0.5 * last).sum()
    weight = vqgan_losses.adaptive_weight(loss, fooling, last)
    assert float(weight) == pytest.approx(14, rel=1e-3)


def test_perception_grows_with_the_difference_and_moves_with_its_grid():
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8, projection_dim=16,
    )  # fmt: skip
    perception = vqgan_losses.Perception(CLIPVisionModelWithProjection(config))
    x = draw(2, 3, 32, 32)
    same, near, far = (
        float(perception(x + e * draw(2, 3, 32, 32, seed=1), x, (0, 0))) for e in (0, 0.1, 1)
    )
    assert same == pytest.approx(0, abs=1e-6)
    assert 0 < near < far
    assert float(perception(x + draw(2, 3, 32, 32, seed=1), x, (3, 5))) != pytest.approx(far)


@pytest.mark.parametrize("live", [0, 5, 1024])
def test_revival_takes_the_codes_that_nothing_used(live):
    model, use = vqgan.build().eval(), torch.zeros(1024)
    use[:live] = 1
    before = model.quantize.embedding.weight.detach().clone()
    told = vqgan.revive(model, use, seed=0, source=SceneWorld())
    moved = (model.quantize.embedding.weight != before).any(dim=1)
    assert not moved[:live].any()
    assert moved[live:].all()
    assert torch.equal(told, moved)
    assert not use.any()


def test_codes_that_move_are_not_averaged_with_where_they_were(tmp_path):
    vqgan.autoencoder(Run(tmp_path, tmp_path, steps=4, batch=4))  # its codes move at the third
    saved = load_file(tmp_path / "autoencoder" / "state.safetensors")
    codes, averaged = (
        saved[f"{kind}model.quantize.embedding.weight"] for kind in ("module.", "ema.module.")
    )
    assert codes.std() > 0.01
    torch.testing.assert_close(averaged, codes, rtol=0, atol=0.01)


def test_a_decoder_learns_further_behind_an_encoder_that_stays(tmp_path):
    run = Run(tmp_path / "new", tmp_path / "runs", steps=2, batch=4, init=tmp_path / "old")
    tower = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, image_size=64, patch_size=8)  # fmt: skip
    CLIPVisionModelWithProjection(tower).save_pretrained(tmp_path / "new" / "image_encoder")
    with pytest.raises(data.BadInput, match=r"--init: .*old/vae is no VQGAN to start from"):
        vqgan.train(run)
    before = vqgan.build()
    before.save_pretrained(tmp_path / "old" / "vae")
    vqgan.train(run)
    assert not (tmp_path / "runs" / "autoencoder").exists()
    after = vqgan.VQModel.from_pretrained(tmp_path / "new" / "vae").state_dict()
    changed = {
        k.split(".")[0] for k, v in before.state_dict().items() if not torch.equal(v, after[k])
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert str(tmp_path) not in (tmp_path / "new" / "vae" / "config.json").read_text()


def test_all_stages_make_a_checkpoint_that_export_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "SCENES", 100)
    monkeypatch.setattr(diffusion, "Painter", partial(diffusion.Painter, channels=32))
    checkpoint, runs = tmp_path / "checkpoint", tmp_path / "runs"
    for stage in (clip, bert, vqgan, diffusion):
        stage.train(Run(checkpoint, runs, steps=4, batch=4))
    for stage in ("bert", "diffusion"):  # both learn the objective of scenes
        heading = (runs / stage / "losses.csv").read_text().partition("\n")[0].split(",")
        assert heading[-len(QUESTIONS) :] == list(QUESTIONS)
    assert open_checkpoint(checkpoint).index["defaults"] == diffusion.DEFAULTS
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    teacher = load_file(checkpoint / weights)
    for steps in (2, 3):  # the second goes on from the first, and from the teacher that it kept
        distill.train(Run(checkpoint, runs, steps=steps, batch=4))
        kept = load_file(tmp_path / "checkpoint-teacher" / weights)
        assert all(torch.equal(kept[name], tensor) for name, tensor in teacher.items())
    assert open_checkpoint(tmp_path / "checkpoint-teacher").index["defaults"] == diffusion.DEFAULTS
    captions_alone = SceneWorld(with_truth=False)
    student, teachers, taught = load_file(checkpoint / weights), [], align.teacher_velocity

    def watched(teacher, *args):
        teachers.append({k: v.clone() for k, v in teacher.state_dict().items()})
        return taught(teacher, *args)

    monkeypatch.setattr(align, "teacher_velocity", watched)
    align.train(Run(checkpoint, runs, steps=3, batch=4, source=captions_alone))
    assert len(teachers) == 3
    for teacher in teachers:  # it stays what the student was
        assert all(torch.equal(teacher[name].half(), tensor) for name, tensor in student.items())
    aligned = load_file(checkpoint / weights)
    assert not all(torch.equal(aligned[name], tensor) for name, tensor in student.items())
    opened = open_checkpoint(checkpoint)
    assert opened.index["defaults"] == distill.DEFAULTS
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    assert unet.config.time_cond_proj_dim == distill.EMBEDDING
    assert str(tmp_path) not in (checkpoint / "unet" / "config.json").read_text()


@pytest.mark.slow
def test_painters_that_were_stopped_end_as_undisturbed_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "SCENES", 100)
    monkeypatch.setattr(diffusion, "Painter", partial(diffusion.Painter, channels=32))
    update = Trainer._update

    def stopped(trainer, loss_at):
        if trainer.step == 3:
            raise KeyboardInterrupt
        return update(trainer, loss_at)

    asked = []

    def heard(read, scenes, captions):
        asked.extend(captions)
        return faults(read, scenes, captions)

    monkeypatch.setattr(align, "faults", heard)
    monkeypatch.setattr(reward, "PICTURES", 100)
    for name in ("whole", "stopped"):
        for part in ("tokenizer", "text_encoder", "bert_tokenizer", "bert", "vae"):
            shutil.copytree(f"checkpoints/scenes-64/{part}", tmp_path / name / part)
        run = Run(tmp_path / name, tmp_path / f"{name}-runs", 4, 4, save_every=2)
        for stage in (diffusion, distill, reward, align):
            if name == "stopped":
                with monkeypatch.context() as patched:
                    patched.setattr(Trainer, "_update", stopped)
                    with pytest.raises(KeyboardInterrupt):
                        stage.train(run)
            stage.train(run)
    for stage, average, part in (
        ("diffusion", "ema.module.unet.", "-teacher/unet"),
        ("reward", "ema.module.", "/reward_model"),
        ("align", "ema.module.", "/unet"),
    ):
        ours, theirs = (
            load_file(tmp_path / f"{name}-runs" / stage / "state.safetensors")
            for name in ("stopped", "whole")
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        written = load_file(f"{tmp_path / 'stopped'}{part}/diffusion_pytorch_model.safetensors")
        for name, tensor in written.items():
            assert torch.equal(tensor, ours[average + name].half()), (part, name)
    assert asked
    assert not any(f"large {colour} {shape}" in " ".join(asked) for shape, colour, _ in HELD_OUT)
    with pytest.raises(data.BadInput, match=r"--steps: 2 is less than the 4 that .*distill"):
        distill.train(replace(run, steps=2))
    with pytest.raises(data.BadInput, match=r"--runs: .*distill.* from a run on other weights"):
        distill.train(replace(run, init=tmp_path / "whole"))
    shutil.rmtree(tmp_path / "stopped-teacher")
    with pytest.raises(data.BadInput, match=r"--checkpoint: .* its teacher .*-teacher is gone"):
        distill.train(run)


def test_a_folder_of_the_teachers_name_is_not_deleted(tmp_path):
    for part in (*distill.FROZEN, *distill.OWN_PARTS):
        (tmp_path / "made" / part).mkdir(parents=True)
    tiny_unet().save_config(tmp_path / "made" / "unet")
    mine = tmp_path / "made-teacher" / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(data.BadInput, match=r"--checkpoint: .*made-teacher is not a teacher that"):
        distill.teacher_of(tmp_path / "made")
    assert mine.exists()


def test_a_teacher_that_was_half_made_is_made_anew(tmp_path, monkeypatch):
    for part in (*distill.FROZEN, *distill.OWN_PARTS):
        (tmp_path / "made" / part).mkdir(parents=True)
    (tmp_path / "made" / "model_index.json").write_text("{}")
    tiny_unet().save_config(tmp_path / "made" / "unet")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "symlink_to", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            distill.teacher_of(tmp_path / "made")
    folder = distill.teacher_of(tmp_path / "made")
    assert {path.name for path in folder.iterdir()} == {
        "model_index.json", *distill.FROZEN, *distill.OWN_PARTS,
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "made-teacher"]


def test_stages_that_need_others_say_which(tmp_path):
    run = Run(tmp_path, tmp_path / "runs", 1, 4)
    for stage, missing in ((diffusion, "text_encoder, bert, vae"), (distill, ".*unet")):
        with pytest.raises(data.BadInput, match=f"--checkpoint: {tmp_path} has no {missing}"):
            stage.train(run)
    with pytest.raises(data.BadInput, match="--batch: 6 is no multiple of 4"):
        clip.train(replace(run, batch=6))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # no tokenizer without its tower


def test_aligning_needs_a_distilled_unet_and_a_reward_model(tmp_path):
    made = tmp_path / "made"
    for part in (*distill.FROZEN, *distill.OWN_PARTS):
        (made / part).mkdir(parents=True)
    run = Run(made, tmp_path / "runs", 1, 4)
    with pytest.raises(data.BadInput, match=f"--checkpoint: {made} has no reward_model: train"):
        align.train(run)
    (made / "reward_model").mkdir()
    tiny_unet().save_config(made / "unet")
    for stage in (align, decoder):
        with pytest.raises(data.BadInput, match=f"--checkpoint: the UNet of {made} is not distill"):
            stage.train(run)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]  # no teacher was made


def test_training_starts_from_the_weights_that_init_names(tmp_path):
    trained = diffusion.Painter(objective=SceneWorld().objective).half()
    trained.fusion.save_pretrained(tmp_path / "fusion")
    trained.unet.save_pretrained(tmp_path / "unet")
    started = diffusion.new_painter(Run(tmp_path, tmp_path, 1, 1, init=tmp_path)).state_dict()
    kept = {k: v for k, v in trained.state_dict().items() if k.startswith(("fusion.", "unet."))}
    assert len(kept) == len(trained.state_dict()) - 2  # the objective's weights begin anew
    for name, tensor in kept.items():
        assert torch.equal(started[name], tensor.float()), name


@pytest.mark.parametrize("other", [None, {}, {"time_cond_proj_dim": 16}])
def test_a_checkpoint_that_training_cannot_start_from_is_named(tmp_path, other):
    painter = diffusion.Painter()
    painter.fusion.save_pretrained(tmp_path / "fusion")
    if other is not None:
        unet = UNet2DConditionModel.from_config(painter.unet.config, **other)
        unet.save_pretrained(tmp_path / "unet")
    reason = "cond_proj" if other else "No such file"
    if other == {}:
        weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        reason = "Error while deserializing"
    with pytest.raises(ValueError, match=f"--init: .*unet.* is no unet to start from: .*{reason}"):
        diffusion.new_painter(Run(tmp_path, tmp_path, 1, 1, init=tmp_path))


def test_a_run_does_not_go_on_from_a_save_on_other_weights(tmp_path):
    module, run = torch.nn.Linear(2, 2), Run(tmp_path, tmp_path, steps=1, batch=1)

    def trainer():
        return run.trainer(module, "stage", 1e-3, 0.9, [tmp_path])

    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    trainer().run(lambda _: {"loss": module(torch.ones(2)).sum()})
    assert trainer().step == 1
    other = r"--runs: .* was saved from a run on other weights or seed"
    with pytest.raises(ValueError, match=other):
        replace(run, seed=1).trainer(module, "stage", 1e-3, 0.9, [tmp_path])
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=other):
        trainer()


def test_latents_are_encoded_anew_for_other_scenes(tmp_path):
    vqgan.build().save_pretrained(tmp_path / "vae")
    kept, other = (world.draw_scenes(seed, 3)[0] for seed in (1, 2))
    first = world.scene_latents(tmp_path, tmp_path, kept, data.CPU)
    assert torch.equal(world.scene_latents(tmp_path, tmp_path, kept, data.CPU), first)
    assert not torch.equal(world.scene_latents(tmp_path, tmp_path, other, data.CPU), first)


def test_captions_of_a_step_never_change(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "SCENES", 100)
    monkeypatch.setattr(world, "scene_latents", lambda *_: draw(100, 8, 8, 8))
    first, second = (world.SceneLatents(tmp_path, tmp_path, 6).at(3) for _ in range(2))
    assert first.captions == second.captions
    assert first.truth == second.truth
    assert torch.equal(first.latents, second.latents)
    assert sample_scene(first.rng) == sample_scene(second.rng)
