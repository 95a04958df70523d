"""The gateway's A1111 door, by the `webuiapi` package and by what other tools send."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from dataclasses import replace

import pytest
import webuiapi
from PIL import Image
from test_gateway_parts import INFO
from test_wire import unet_calls, wait_for_a_call

from gateway import sampler_names
from gateway.errors import ApiError
from gateway.png_info import parameters
from gateway.sdapi_fields import TextToImage
from twinbrush_client import Client

TXT2IMG = "/sdapi/v1/txt2img"
SAMPLERS = ["lcm", "ddim", "euler", "dpmpp_2m", "euler_a", "dpmpp_2m_sde", "pndm"]


@pytest.fixture(scope="module")
def api(gateway):
    return webuiapi.WebUIApi(host="127.0.0.1", port=gateway.port)


def test_webuiapi_paints_what_grpc_paints(api, server):
    result = api.txt2img(
        prompt="a (red:1.3) circle", negative_prompt="blue", seed=7, steps=4, width=64, height=32,
        cfg_scale=2, sampler_name="DPM++ 2M", scheduler="Karras", batch_size=2, n_iter=2,
    )  # fmt: skip
    with Client(server.address) as client:
        wanted = client.generate(
            "a (red:1.3) circle", negative_prompt="blue", seed=7, steps=4, width=64, height=32,
            prompt_syntax="a1111", guidance_scale=2, sampler="dpmpp_2m", sigma_schedule="karras",
            num_images=4,
        )  # fmt: skip
    assert [image.tobytes() for image in result.images] == [image.tobytes() for image in wanted]
    assert result.info["all_seeds"] == [7, 8, 9, 10]
    assert result.info["sampler_name"] == "DPM++ 2M"
    assert "Steps: 4" in result.info["infotexts"][0]
    assert result.parameters["prompt"] == "a (red:1.3) circle"


def test_webuiapi_finds_what_it_asks_for_at_its_start(api, gateway, server):
    with Client(server.address) as client:
        info = client.info()
    assert api.get_options()["sd_model_checkpoint"] == info.checkpoint
    assert [model["title"] for model in api.get_sd_models()] == [info.checkpoint]
    assert {s["aliases"][0] for s in api.get_samplers()} == set(info.samplers)
    assert {s["name"] for s in api.get_schedulers()} >= {"automatic", "karras"}
    assert api.get_sd_vae() == api.get_loras() == []
    assert [upscaler["name"] for upscaler in api.get_upscalers()] == ["None"]
    for name in ("hypernetworks", "sd-vae", "cmd-flags", "memory", "scripts"):
        assert gateway.call(f"/sdapi/v1/{name}").status == 200
    assert gateway.call("/internal/ping").json() == {}
    assert api.get_progress()["progress"] == 0
    api.refresh_checkpoints()
    assert gateway.call("/sdapi/v1/refresh-embeddings", {}).status == 200


@pytest.mark.parametrize(
    "path", ["/sdapi/v1/unload-checkpoint", "/controlnet/model_list", "/internal/progress"]
)
def test_a_path_of_a1111s_that_is_not_served_says_so(gateway, path):
    answer = gateway.call(path, {})
    assert (answer.status, answer.json()["error"]) == (404, "not_found")
    assert f"POST {path} is not served" in answer.json()["detail"]


def test_png_info_reads_what_txt2img_wrote(api, gateway):
    fields = {"prompt": "a ring,\nthin", "negative_prompt": "blue: dark", "seed": 7, "steps": 2,
              "width": 64, "height": 32, "sampler_name": "Euler a"}  # fmt: skip
    (text,) = gateway.call(TXT2IMG, fields).json()["images"]
    for image in (text, f"data:image/png;base64,{text}"):
        answer = gateway.call("/sdapi/v1/png-info", {"image": image})
        assert answer.status == 200
        found = answer.json()
        assert found["info"].startswith("a ring,\nthin\nNegative prompt: blue: dark\nSteps: 2, ")
        wanted = {"Prompt": "a ring,\nthin", "Negative prompt": "blue: dark", "Steps": "2",
                  "Seed": "7", "Size-1": "64", "Size-2": "32", "Sampler": "euler_a"}  # fmt: skip
        assert found["parameters"] | wanted == found["parameters"]
        assert json.loads(found["items"]["twinbrush"])["seed"] == 7
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""
    for wrong in ("", "x", "AAAA", text[:40]):
        answer = gateway.call("/sdapi/v1/png-info", {"image": wrong})
        assert answer.status == 400
        assert "image=" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {}),
        ("a ring", {"Prompt": "a ring", "Negative prompt": ""}),
        (
            'a\nNegative prompt: b\nc\nSteps: 20, Model: "x, \\"y\\"", Size: 8x16, Version: v1.10',
            {"Prompt": "a", "Negative prompt": "b\nc", "Steps": "20", "Model": 'x, "y"',
             "Size-1": "8", "Size-2": "16", "Version": "v1.10"},
        ),
        ("x: y, Steps are steep", {"Prompt": "x: y, Steps are steep", "Negative prompt": ""}),
    ],
)  # fmt: skip
def test_a1111s_text_is_read_in_parts(text, wanted):
    assert parameters(text) == wanted


def test_what_needs_images_is_refused_with_its_reason(api):
    image = Image.new("RGB", (8, 8))
    for ask in (
        lambda: api.img2img(images=[image], prompt="a ring"),
        lambda: api.extra_single_image(image),
        lambda: api.extra_batch_images([image]),
        lambda: api.interrogate(image),
    ):
        with pytest.raises(RuntimeError, match="it needs image inputs") as error:
            ask()
        assert error.value.args[0] == 400


def test_options_are_kept_and_checked(api, gateway):
    (model,) = api.util_get_model_names()
    api.set_options({"sd_model_checkpoint": model, "samples_format": "jpg"})
    assert api.get_options()["samples_format"] == "jpg"
    result = api.txt2img(prompt="a ring", width=32, height=32)
    assert result.image.format == "JPEG"
    assert all(result.info[name] for name in ("sampler_name", "cfg_scale", "sd_model_hash"))
    settings = {"samples_format": "png", "sd_model_checkpoint": None}
    image = api.txt2img(prompt="a ring", width=32, height=32, override_settings=settings).image
    assert image.format == "PNG"
    api.set_options({"samples_format": "png", "sd_model_checkpoint": ""})
    for wrong in ({"sd_model_checkpoint": "none"}, {"samples_format": "gif"}, {"sd_vae": "x"}):
        answer = gateway.call("/sdapi/v1/options", wrong)
        assert answer.status in (400, 404)
        assert next(iter(wrong.values())) in answer.json()["detail"]
    api.set_options(api.get_options() | {"show_progress_every_n_steps": 5})  # what is read is taken


def test_a_checkpoint_is_found_by_what_a1111_calls_it(api, gateway):
    (served,) = api.get_sd_models()
    name, sha256 = served["title"], served["sha256"]
    for title in (f"{name}.safetensors [{sha256[:10]}]", f"{name} [0123456789]", f"{name}.ckpt",
                  sha256, sha256[:10].upper()):  # fmt: skip
        api.set_options({"sd_model_checkpoint": title})
        assert api.get_options()["sd_model_checkpoint"] == name
        settings = {"sd_model_checkpoint": title}
        result = api.txt2img(prompt="a ring", width=32, height=32, override_settings=settings)
        assert result.info["sd_model_name"] == name
    api.set_options({"sd_model_checkpoint": ""})
    for wrong in (f"{name}2.ckpt [{sha256[:10]}]", "0123456789", sha256[:9], "[abc]", ".ckpt"):
        answer = gateway.call("/sdapi/v1/options", {"sd_model_checkpoint": wrong})
        assert answer.status == 404, wrong
        assert wrong in answer.json()["detail"]


@pytest.mark.parametrize("end", [webuiapi.WebUIApi.interrupt, webuiapi.WebUIApi.skip])
def test_progress_shows_a_preview_and_interrupt_ends_it(api, server, end):
    results = []
    slow = {"prompt": "a ring", "width": 128, "height": 128, "steps": 50, "batch_size": 8}
    before = unet_calls(server)
    painting = threading.Thread(target=lambda: results.append(api.txt2img(**slow)))
    painting.start()
    wait_for_a_call(server, before)
    until = time.monotonic() + 30
    while not (seen := api.get_progress())["current_image"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert 0 < seen["progress"] < 1
    assert seen["state"]["sampling_steps"] == 50
    assert Image.open(io.BytesIO(base64.b64decode(seen["current_image"]))).height == 128
    end(api)
    painting.join(30)
    assert unet_calls(server) - before < 8 * 50 / 2
    assert all(image.size == (128, 128) for image in results[0].images)
    assert results[0].info["all_seeds"] == []
    assert results[0].info["sampler_name"]
    assert api.get_progress()["progress"] == 0


REFUSED = [
    ({"enable_hr": True}, "enable_hr"),
    ({"restore_faces": True}, "restore_faces"),
    ({"styles": ["x"]}, "styles"),
    ({"clip_skip": 2}, "clip_skip"),
    ({"denoising_strength": float("nan")}, "NaN"),
    ({"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "x"}]}}}, "alwayson_scripts"),
    ({"override_settings": {"sd_vae": "x"}}, "override_settings.sd_vae"),
    ({"override_settings": {"sd_model_checkpoint": ["x"]}}, "sd_model_checkpoint=['x']"),
    ({"prompt": "a ring <lora:ink:0.8>"}, "lora"),
    ({"sampler_name": "Restart"}, "sampler_name"),
    ({"scheduler": "Align"}, "scheduler"),
    ({"width": 33}, "width"),
    ({"batch_size": 16, "n_iter": 2}, "n_iter"),
    ({"steps": "many"}, "steps"),
    ({"steps": 0}, "steps=0 is invalid: must be between 1 and 50."),
    ({"seed": 2**63}, "must be between -1 and 9223372036854775807"),
    ({"prompt": ""}, "prompt"),
    ({"sampler_name": "Euler a", "eta": 0.5}, "eta=0.5 is invalid: Euler a is served at 1 alone."),
    ({"sampler_name": "DPM++ 2M SDE", "eta": 0.5}, "eta=0.5"),
    ({"sampler_name": "DPM++ 2M SDE", "s_noise": 0}, "s_noise=0"),
    ({"override_settings": {"eta_ancestral": 0}}, "override_settings.eta_ancestral"),
    ({"override_settings": {"s_noise": 0.0}}, "override_settings.s_noise"),
]


@pytest.mark.parametrize(("fields", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_what_is_not_served_is_refused_by_name(gateway, fields, name):
    answer = gateway.call(TXT2IMG, {"prompt": "a ring"} | fields)
    assert answer.status == 400
    assert name in answer.json()["detail"]


# What SillyTavern, Open WebUI, Forge's clients and webuiapi send besides what they ask for.
HARMLESS = {
    "url": "http://127.0.0.1:7860", "auth": "a:b", "distilled_cfg_scale": 3.5, "tiling": None,
    "hr_second_pass_steps": 0, "s_tmax": None, "s_tmin": 0, "firstphase_width": 0,
    "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_additional_modules": ["same"],
    "denoising_strength": 0.7, "restore_faces": False, "styles": [], "subseed": -1,
    "subseed_strength": 0, "s_churn": 0, "s_noise": 1, "script_name": None, "script_args": [],
    "do_not_save_samples": False, "refiner_checkpoint": "", "sampler_index": "Euler",
    "save_images": True, "send_images": True, "do_not_save_grid": False, "clip_skip": 1,
    "alwayson_scripts": {"ADetailer": {"args": [False]}, "controlnet": {"args": []}},
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": True, "seed_resize_from_h": -1, "eta": None,
}  # fmt: skip


def test_fields_that_ask_for_nothing_are_taken(gateway):
    answer = gateway.call(TXT2IMG, {"prompt": "a ring"} | HARMLESS)
    assert answer.status == 200
    body = answer.json()
    assert len(body["images"]) == 1
    assert body["parameters"]["hr_scale"] == 2
    info = json.loads(body["info"])
    assert info["seed"] >= 0
    assert info["warnings"] == ["ignored: 'url', 'auth', 'distilled_cfg_scale'"]
    none = {"override_settings": {"sd_model_checkpoint": ""}}
    answer = gateway.call(TXT2IMG, {"prompt": "a ring", "send_images": False} | none)
    assert answer.json()["images"] == []


@pytest.mark.parametrize(
    ("sampler", "scheduler", "wanted"),
    [
        (None, None, (None, None)),
        ("Euler a", "Automatic", ("euler_a", "default")),
        ("k_euler_a", "karras", ("euler_a", "karras")),
        ("euler_ancestral", None, ("euler_a", None)),
        ("dpmpp_2m", "sgm_uniform", ("dpmpp_2m", "sgm_uniform")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", "automatic", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M Karras", "SGM Uniform", ("dpmpp_2m", "sgm_uniform")),
        ("Euler a SGM Uniform", None, ("euler_a", "sgm_uniform")),
        ("dpmpp_2m beta", "Automatic", ("dpmpp_2m", "beta")),
        ("Euler a Normal", None, ("euler_a", "normal")),
        ("Euler a Automatic", None, ("euler_a", "default")),
        ("PLMS", "Uniform", ("pndm", "default")),
        ("ddim", None, ("ddim", None)),
        ("ddim", "default", ("ddim", "default")),
    ],
)
def test_names_of_samplers_are_a1111s(sampler, scheduler, wanted):
    assert sampler_names.chosen(sampler, scheduler, SAMPLERS) == wanted


def test_a_sampler_that_the_server_has_not_is_unknown():
    with pytest.raises(ApiError, match="sampler_name='UniPC' is invalid"):
        sampler_names.chosen("UniPC", None, SAMPLERS)


def test_loras_are_named_in_the_prompt():
    body = TextToImage(prompt="a ring <lora:ink:0.8>, thin<lora:film>", sampler_name="Euler")
    fields = body.fields(INFO, "png")
    assert (body.painted_prompt, fields["lora"]) == ("a ring, thin", "ink:0.8,film")
    without = TextToImage(prompt="a <b>", sampler_name="Euler")
    assert without.fields(INFO, "png")["lora"] is None


def test_eta_is_of_the_samplers_that_take_it():
    def eta(sampler):
        body = TextToImage(prompt="a ring", eta=0.5, sampler_name=sampler)
        return body.fields(INFO, "png")["eta"]

    assert eta("DDIM") == 0.5
    assert eta("Euler") is None


@pytest.mark.parametrize(
    ("sampler", "eta", "painted"),
    [("Euler a", 0, "euler"), ("Euler a", 1, "euler_a"), ("DPM++ 2M SDE", 0, "dpmpp_2m")],
)
def test_an_ancestral_sampler_without_noise_is_its_plain_one(sampler, eta, painted):
    body = TextToImage(prompt="a ring", eta=eta, sampler_name=sampler)
    served = replace(INFO, samplers=SAMPLERS)
    assert body.fields(served, "png")["sampler"] == painted


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("a [ring:star:0.5]", "[ring:star:0.5]"),
        ("a [red:3] ring", "[red:3]"),
        ("a [red|blue] ring", "[red|blue]"),
        ("a ring AND a star", "AND"),
        ("a [ring], (red:1.2), [a] | [b] BRAND", None),
    ],
)
def test_what_is_read_as_text_is_a_warning(prompt, part):
    expected = [f"prompt: {part!r} is read as text"] if part else []
    assert TextToImage(prompt=prompt).warnings == expected
