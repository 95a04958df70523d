"""Training of the fusion head alone, in checkpoints of Stable Diffusion's and XL's layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from harness import ROOT, contents, free_ports
from safetensors.torch import load_file
from test_captioned import many, write
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from checkpoints import TOKENS, TOWER, stable_diffusion, text_model, tiny_checkpoint
from export.checkpoint import open_checkpoint
from export.repository import load_parts
from training import fusion
from training.captioned import Captioned
from training.compute import Compute
from training.data import BadInput
from training.frozen import Frozen
from training.fusion import main, train_fusion
from training.loop import Trainer
from training.preparation import Preparation
from training.run import Run

WEIGHTS = Path("fusion", "diffusion_pytorch_model.safetensors")
GATES = ("attention_gate", "feed_forward_gate")


def stable_diffusion_xl(folder: Path) -> Path:
    """A checkpoint as Stable Diffusion XL is one: two CLIPs of other widths, pooled and sizes."""
    stable_diffusion(folder, distilled=False)
    torch.manual_seed(1)
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    second = CLIPTextConfig(
        **TOWER | {"hidden_size": 48, "num_attention_heads": 3}, projection_dim=24,
        vocab_size=config.vocab_size, bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )  # fmt: skip
    CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
        cross_attention_dim=32 + 48, attention_head_dim=2, norm_num_groups=8,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    EulerDiscreteScheduler(prediction_type="epsilon").save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


KINDS = {
    "sd": lambda folder: stable_diffusion(folder, distilled=False),
    "lcm": lambda folder: stable_diffusion(folder, distilled=True),
    "sdxl": stable_diffusion_xl,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return text_model(tmp_path_factory.mktemp("bert") / "bert", "roberta")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write("jsonl", tmp_path_factory.mktemp("pictures") / "data", many(12))


@pytest.fixture
def train(bert, pictures, tmp_path):
    """Runs the command in this process; gives the folder that it wrote."""

    def train(checkpoint: Path, name: str = "out", **options: object) -> Path:
        given: dict = {
            "bert": str(bert), "runs": tmp_path / f"{name}-runs", "path": pictures, "batch": 4,
            "steps": 40, "learning_rate": 0.02, "device": "cpu",
        }  # fmt: skip
        main(str(checkpoint), tmp_path / name, **given | options)
        return tmp_path / name

    return train


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_only_the_head_changes(kind, train, bert, tmp_path, capsys):
    checkpoint = KINDS[kind](tmp_path / kind)
    before, texts = contents(checkpoint), contents(bert)
    out = train(checkpoint)
    losses = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert losses["before"] == losses["clip_alone"]  # a new head is the identity
    assert losses["after"] < 0.99 * losses["before"]
    assert contents(checkpoint) == before
    assert contents(bert) == texts
    for name, hashed in before.items():
        if name != "model_index.json":
            assert contents((out / name).parent)[Path(name).name] == hashed
    assert contents(out / "bert")["model.safetensors"] == texts["model.safetensors"]
    head = load_file(out / WEIGHTS)
    for level in range(2):
        assert all(head[f"levels.{level}.{gate}"].abs().max() > 0 for gate in GATES)
    index = json.loads((out / "model_index.json").read_text())
    assert index["bert"] == ["transformers", "RobertaModel"]
    assert index["fusion"] == ["networks.fusion_head", "FusionHead"]
    assert {name: index[name] for name in ("unet", "text_encoder", "_class_name")} == {
        name: json.loads((checkpoint / "model_index.json").read_text())[name]
        for name in ("unet", "text_encoder", "_class_name")
    }
    if kind == "sdxl":  # its second CLIP keeps its names
        assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
        assert (out / "tokenizer_2").is_dir()
    else:
        assert load_parts(open_checkpoint(out))["fusion"].output[1].axes == (TOKENS, 32)


def test_training_that_was_killed_ends_with_the_same_head(train, tmp_path, monkeypatch, capsys):
    checkpoint = stable_diffusion(tmp_path / "sd", distilled=False)
    options = {"steps": 4, "save_every": 2, "accumulate": 2, "checkpointing": True}
    whole = train(checkpoint, "whole", **options)
    save = Trainer._save

    def killed(trainer, position):
        save(trainer, position)
        if trainer.step < trainer.steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(checkpoint, "again", **options)
    assert not (tmp_path / "again").exists()
    capsys.readouterr()
    again = train(checkpoint, "again", **options)
    losses = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert losses["before"] == losses["clip_alone"] != losses["after"]  # the start, not the save
    assert (again / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_checkpoint_continues_with_its_own_head_and_can_be_copied(train, tmp_path, capsys):
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    out = train(checkpoint, bert=None, steps=1, copy=True)
    losses = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert losses["before"] != losses["clip_alone"]
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert contents(out / "bert") == contents(checkpoint / "bert")
    assert contents(out / "unet") == contents(checkpoint / "unet")
    assert open_checkpoint(out).index["defaults"] == open_checkpoint(checkpoint).index["defaults"]


def test_passes_of_a_step_add_up_to_the_mean_gradient(tmp_path):
    draws = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Linear(3, 1)
    trainer = Trainer(module, tmp_path, 3, 1e-9, compute=Compute(passes=2))
    seen = []

    def loss_at(draw):
        seen.append(draw)
        return {"loss": 0.1 * module(draws[draw]).sum()}

    trainer.run(loss_at)
    assert seen == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(module.weight.grad[0], 0.1 * draws[4:].mean(0))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_target_and_the_betas_are_the_schedulers(prediction, bert, tmp_path):
    """A UNet that gives the target has no loss."""
    checkpoint = stable_diffusion(tmp_path / "sd", distilled=False)
    config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    config |= {"prediction_type": prediction, "beta_end": 0.02}
    (checkpoint / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    frozen = Frozen(open_checkpoint(checkpoint, bert), torch.device("cpu"))
    betas = torch.linspace(0.00085**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    torch.testing.assert_close(frozen.alphas_cumprod.double(), alphas, rtol=1e-4, atol=1e-6)
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    class Right(torch.nn.Module):
        config = frozen.unet.config

        def forward(self, x_t, t, encoder_hidden_states):
            a = alphas[t].float()[:, None, None, None]
            noise = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
            outputs = {
                "epsilon": noise, "sample": x0,
                "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0,
            }  # fmt: skip
            return type("Output", (), {"sample": outputs[prediction]})

    frozen.unet = Right()
    batch = fusion.LatentBatch(x0, ["a", "b"], fusion.np.random.default_rng(0), [])
    assert frozen.loss(None, batch, 3).item() < 1e-4


def test_xl_reads_the_states_before_the_last_layer_and_the_pooled_vector(bert, tmp_path):
    frozen = Frozen(
        open_checkpoint(stable_diffusion_xl(tmp_path / "xl"), bert), torch.device("cpu")
    )
    conditions = frozen.texts(["two green stars"])
    pair = frozen.texts.clip.module
    ids, _ = frozen.texts._tokens("tokenizer", ["two green stars"], TOKENS)
    with torch.no_grad():
        first = pair.first(ids, output_hidden_states=True).hidden_states[-2]
        second = pair.second(ids, output_hidden_states=True)
    torch.testing.assert_close(conditions.clip_tokens[..., :32], first)
    torch.testing.assert_close(conditions.clip_tokens[..., 32:], second.hidden_states[-2])
    torch.testing.assert_close(conditions.pooled, second.text_embeds)
    further = frozen._further_inputs(conditions, torch.zeros(1, 4, 8, 8))["added_cond_kwargs"]
    assert further["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, "error: --data is required: a folder of pictures and captions"),
        ({"bert": None}, r"error: checkpoint .*sd lacks its part bert/; --bert names a text model"),
        ({"side": 44}, "error: --side: 44 is not a multiple of 8, which the UNet needs"),
        ({"learning_rate": 0.0}, "error: --learning-rate: 0.0 is not over 0"),
        ({"keep": ["stars>=3"]}, "error: --keep: 'stars>=3' names a column that the data has not"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(options, message, train, tmp_path):
    checkpoint = stable_diffusion(tmp_path / "sd", distilled=False)
    with pytest.raises(SystemExit, match=message):
        train(checkpoint, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["sd"]


def test_a_folder_that_exists_is_not_overwritten(train, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(
        SystemExit, match=r"error: --out: .*out exists: name a folder that does not"
    ):
        train(tmp_path)


def test_a_save_of_more_processes_is_refused():
    assert Compute().own({"place": 1}) == {"place": 1}
    with pytest.raises(BadInput, match="--runs: the save is of 2 processes, these are 1"):
        Compute().own([{}, {}])


def test_other_weights_do_not_continue_from_a_save(bert, pictures, tmp_path):
    source = Captioned(pictures, Preparation(32))
    run = Run(tmp_path / "out", tmp_path / "runs", 1, 2, source=source)
    first = stable_diffusion(tmp_path / "sd", distilled=False)
    train_fusion(run, open_checkpoint(first, bert), Compute())
    unet = first / "unet" / "diffusion_pytorch_model.safetensors"
    other = stable_diffusion(tmp_path / "other", distilled=True) / "unet" / unet.name
    shutil.copy(other, unet)
    shutil.copy(other.with_name("config.json"), unet.with_name("config.json"))
    with pytest.raises(BadInput, match=r"--runs: .*fusion.* from a run on other weights or seed"):
        train_fusion(run, open_checkpoint(first, bert), Compute())


def test_two_processes_train_as_one_with_two_passes(bert, train, tmp_path):
    """On a single picture, where the order of the data is the same for all."""
    checkpoint = stable_diffusion(tmp_path / "sd", distilled=False)
    data = write("jsonl", tmp_path / "data", many(1))
    options = {"steps": 3, "batch": 1, "path": data}
    one = load_file(train(checkpoint, "one", accumulate=2, **options) / WEIGHTS)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
        str(free_ports(1)[0]), "-m", "training.fusion", checkpoint, "--bert", bert, "--data", data,
        "--out", tmp_path / "two", "--runs", tmp_path / "two-runs", "--steps", "3", "--batch", "1",
        "--learning-rate", "0.02", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip
    ended = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "fusion: process 1: 3 rows, 3 used" in ended.stdout
    two = load_file(tmp_path / "two" / WEIGHTS)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    with pytest.raises(SystemExit, match="error: --runs: the save is of 2 processes, these are 1"):
        train(checkpoint, "two-again", runs=tmp_path / "two-runs", **options | {"steps": 4})
