"""The engine over real ONNX files, in-process."""

from __future__ import annotations

import gc
import io
import itertools
import random
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
from harness import ROOT, open_engine
from PIL import Image

from twinbrush.engine.capacity import capacities
from twinbrush.engine.config import MAX_SIDE, PipelineConfig, read_parameters, whole_numbers
from twinbrush.engine.engine import Engine
from twinbrush.engine.generation import End, EngineError, Finished, Generation, Progress
from twinbrush.engine.limits import Limits
from twinbrush.engine.request import GenerationRequest
from twinbrush.runtimes.onnx_runtime import LocalModels, open_session, read_config

PROMPTS = ["a red circle", "a blue square left of a green star", "two rings", "on white, a cross"]


def request(engine: Engine, prompt: str = PROMPTS[0], **fields) -> GenerationRequest:
    types = {"seed": np.int64, "guidance_scale": np.float32}
    tensors = {
        name: np.array([v.encode() if isinstance(v, str) else v],
                       object if isinstance(v, str) else types.get(name))
        for name, v in {"prompt": prompt, "seed": 1, "image_format": "png", **fields}.items()
    }  # fmt: skip
    return GenerationRequest.parse(tensors, engine.config)


class Client:
    """Collects the events of one request."""

    def __init__(self, engine: Engine, wanted: GenerationRequest, on_event=None):
        self.events: list = []
        self.ended = threading.Event()
        self.on_event = on_event
        self.generation: Generation = engine.submit(wanted, self.take)

    def take(self, event) -> None:
        self.events.append(event)
        if self.on_event:
            self.on_event(self, event)
        if isinstance(event, End):
            self.ended.set()

    def wait(self) -> Client:
        assert self.ended.wait(60), f"it never ended: {self.events}"
        return self

    @property
    def error(self) -> EngineError | None:
        return self.wait().events[-1].error

    @property
    def images(self) -> list[bytes]:
        done = [event for event in self.wait().events if isinstance(event, Finished)]
        return [event.image for event in sorted(done, key=lambda event: event.index)]


class Watched:
    """`Models` that note every UNet call and can hold or break one."""

    def __init__(self, repository):
        self.models = LocalModels(repository)
        self.calls: list[int] = []  # rows of each UNet call
        self.before_unet = lambda inputs: None

    def run(self, model, inputs):
        if model == "unet":
            self.before_unet(inputs)
            self.calls.append(len(inputs["sample"]))
        return self.models.run(model, inputs)


@pytest.fixture
def watched(repository):
    return Watched(repository)


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image))).astype(int)


def test_events_come_in_order_and_end_once(engine):
    client = Client(engine, request(engine, num_images=2, steps=3, preview_every=2)).wait()
    for index in (0, 1):
        mine = [event for event in client.events if getattr(event, "index", None) == index]
        assert [event.step for event in mine[:-1]] == [1, 2, 3]
        assert [bool(event.image) for event in mine[:-1]] == [False, True, False]
        assert isinstance(mine[-1], Finished)
    assert [isinstance(event, End) for event in client.events].count(True) == 1
    assert client.error is None


def test_the_same_seed_gives_the_same_image_and_image_k_is_seed_plus_k(engine):
    together = Client(engine, request(engine, seed=7, num_images=3)).images
    alone = [Client(engine, request(engine, seed=7 + k)).images[0] for k in range(3)]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1
    assert len(set(alone)) == 3


def mixed_fields(rng: random.Random) -> dict:
    fields = {
        "prompt": rng.choice(PROMPTS), "seed": rng.randrange(1000), "steps": rng.randint(1, 12),
        "sampler": rng.choice(["lcm", "ddim", "euler", "dpmpp_2m"]),
        "guidance_scale": rng.choice([0.0, 1.0, 2.5, 7.5]), "width": rng.choice([32, 32, 48]),
    }  # fmt: skip
    if rng.random() < 0.5:
        fields["negative_prompt"] = "a blue ring"
    return fields


@pytest.mark.parametrize("kind", ["repository", "distilled_repository"])
def test_neighbours_never_change_an_image(kind, request: pytest.FixtureRequest):
    engine = open_engine(request.getfixturevalue(kind))
    rng = random.Random(0)
    fields = [mixed_fields(rng) for _ in range(16)]
    requests = [globals()["request"](engine, **f) for f in fields]
    alone = [Client(engine, r).images[0] for r in requests]
    for order in (requests, requests[::-1]):
        images = {r: Client(engine, r) for r in order}
        for r, image in zip(requests, alone, strict=True):
            assert np.abs(pixels(images[r].images[0]) - pixels(image)).max() <= 1
    engine.close()


def test_deterministic_bytes_do_not_depend_on_neighbours(engine):
    mine = request(engine, deterministic=True, image_format="raw", steps=6, num_images=2)
    alone = Client(engine, mine).images
    rng = random.Random(1)
    for _ in range(3):
        others = [Client(engine, request(engine, **mixed_fields(rng))) for _ in range(8)]
        client = Client(engine, mine)
        others += [Client(engine, request(engine, **mixed_fields(rng))) for _ in range(7)]
        assert client.images == alone
        for other in others:
            other.wait()


def test_requests_share_unet_calls(repository, watched):
    engine = open_engine(repository, watched)
    hold = threading.Event()
    watched.before_unet = lambda inputs: hold.wait(10)
    fields = [{"steps": steps, "sampler": sampler, "guidance_scale": scale}
              for steps, sampler, scale in itertools.product(
                  (4, 5), ("ddim", "lcm", "euler", "dpmpp_2m"), (1.0, 3.0))]  # fmt: skip
    clients = [Client(engine, request(engine, PROMPTS[i % 4], **f)) for i, f in enumerate(fields)]
    while len(engine._batcher) < len(fields):  # all have joined before the second call
        time.sleep(0.001)
    hold.set()
    for client in clients:
        assert client.error is None
    rows = sum(f["steps"] * (2 if f["guidance_scale"] != 1 else 1) for f in fields)
    assert sum(watched.calls) == rows
    assert len(watched.calls) <= rows / 16 + 8
    engine.close()


def test_buckets_pad_calls_and_leave_images_as_they_are(repository, watched):
    plain = open_engine(repository)
    padded = open_engine(repository, watched, limits=Limits(row_buckets=(1, 4, 16)))
    wanted = request(plain, num_images=3, guidance_scale=1.0)
    expected, got = Client(plain, wanted).images, Client(padded, wanted).images
    assert set(watched.calls) <= {1, 4, 16}
    assert 4 in watched.calls
    for a, b in zip(expected, got, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1
    plain.close()
    padded.close()


def test_a_short_request_overtakes_a_crowd_of_long_ones(engine):
    long = [Client(engine, request(engine, steps=50, seed=i)) for i in range(16)]
    short = Client(engine, request(engine, steps=2)).wait()
    assert short.error is None
    assert not any(client.ended.is_set() for client in long)
    for client in long:
        client.generation.cancel()
        client.wait()


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_cancel_at_any_step_frees_its_rows_before_the_next_call(repository, watched, step):
    engine = open_engine(repository, watched)
    steps, client_box = 6, []

    def before_unet(inputs):
        if len(watched.calls) == step - 1:
            client_box[0].generation.cancel()

    ready = threading.Event()
    watched.before_unet = lambda inputs: (ready.wait(10), before_unet(inputs))
    client_box.append(Client(engine, request(engine, steps=steps, guidance_scale=3.0)))
    ready.set()
    assert client_box[0].error.code == "CANCELLED"
    after = Client(engine, request(engine, steps=2, guidance_scale=1.0))
    assert after.error is None
    assert watched.calls == [2] * step + [1] * 2
    assert not engine._admission.live
    engine.close()


def test_a_cancelled_place_is_taken_in_the_very_next_call(repository, watched):
    engine = open_engine(repository, watched, limits=Limits(2))
    clients: list[Client] = []
    reached, go_on = threading.Event(), threading.Event()

    def before_unet(inputs):
        if not watched.calls:
            reached.set()
            go_on.wait(10)

    watched.before_unet = before_unet
    for seed in range(3):
        clients.append(Client(engine, request(engine, steps=9, seed=seed, guidance_scale=1.0)))
        reached.wait(10)  # the first is in a call of its own when the others come
    while len(engine._batcher) < 3:
        time.sleep(0.001)
    clients[0].generation.cancel()
    go_on.set()
    assert [client.error and client.error.code for client in clients] == ["CANCELLED", None, None]
    assert watched.calls == [1] + [2] * 9
    engine.close()


def test_a_full_queue_refuses_and_recovers(repository, watched):
    engine = open_engine(repository, watched, limits=Limits(queue_size=3))
    hold = threading.Event()
    watched.before_unet = lambda inputs: hold.wait(10)
    clients = [Client(engine, request(engine, seed=i)) for i in range(3)]
    with pytest.raises(EngineError, match="the queue is full") as error:
        Client(engine, request(engine))
    assert error.value.code == "RESOURCE_EXHAUSTED"
    assert error.value.retry_after >= 1
    hold.set()
    assert all(client.error is None for client in clients)
    assert Client(engine, request(engine)).error is None
    engine.close()


def test_a_failing_call_fails_its_own_requests_only(repository, watched, caplog):
    engine = open_engine(repository, watched)

    def before_unet(inputs):
        if inputs["sample"].shape[-1] == 12:
            raise RuntimeError("secret detail")

    watched.before_unet = before_unet
    broken = Client(engine, request(engine, width=48))
    sound = Client(engine, request(engine))
    assert sound.error is None
    assert broken.error.code == "INTERNAL"
    assert "secret" not in str(broken.error)
    assert "secret detail" in caplog.text
    assert not engine._admission.live
    engine.close()


def as_an_earlier_export(repository, watched):
    """Lets the decoder give the picture itself, in place of pixels."""
    session = open_session(repository / "vqgan_decoder" / "1" / "model.onnx", {})
    run = watched.models.run
    watched.models.run = lambda model, inputs: (
        {"image": session.run(["image"], dict(inputs))[0]}
        if model == "vqgan_decoder"
        else run(model, inputs)
    )


def test_a_decoder_of_an_earlier_export_gives_the_same_files(repository, watched):
    engine = open_engine(repository, watched)
    wanted = Client(engine, request(engine, num_images=2, deterministic=True)).images
    as_an_earlier_export(repository, watched)
    assert Client(engine, request(engine, num_images=2, deterministic=True)).images == wanted
    engine.close()


@pytest.mark.parametrize("earlier", [False, True])
def test_a_picture_that_is_not_finite_fails_its_own_request_only(
    repository, watched, caplog, earlier
):
    engine = open_engine(repository, watched)
    if earlier:
        as_an_earlier_export(repository, watched)
    run, held, go_on = watched.models.run, threading.Event(), threading.Event()

    def spoil(model, inputs):
        result = run(model, inputs)
        if model == "vqgan_decoder":
            held.set()
            assert go_on.wait(60)
            if len(inputs["latent"]) == 2:
                spoilt = result["image" if earlier else "mean_magnitude"]
                spoilt.reshape(2, -1)[0, 0] = np.nan
        return result

    watched.models.run = spoil  # type: ignore[method-assign]
    clients = [Client(engine, request(engine, steps=1))]
    assert held.wait(60)
    clients += [Client(engine, request(engine, seed=i, steps=1)) for i in range(2)]
    until = time.monotonic() + 60
    while engine._decoder._waiting.qsize() < 2:  # to be decoded in one call
        assert time.monotonic() < until
        time.sleep(0.01)
    go_on.set()
    codes = [client.error and client.error.code for client in clients]
    assert sorted(codes, key=str) == ["INTERNAL", None, None]
    assert "not finite" in caplog.text
    engine.close()


def test_a_decoder_is_given_few_pictures_at_a_time(repository, watched):
    engine = open_engine(repository, watched, limits=Limits(16))
    run, sizes = watched.models.run, []

    def watch(model, inputs):
        if model == "vqgan_decoder":
            sizes.append(len(inputs["latent"]))
        return run(model, inputs)

    watched.models.run = watch  # type: ignore[method-assign]
    for side, most in ((32, 2), (64, 1)):
        sizes.clear()
        asked = request(engine, num_images=5, steps=1, width=side, height=side)
        assert Client(engine, asked).error is None
        assert sum(sizes) == 5
        assert max(sizes) <= most
    engine.close()


@pytest.mark.parametrize("rows", [2, 6, 32, 100])
@pytest.mark.parametrize("native_side", [64, 512, 768, 1024, 4096])
def test_calls_of_larger_pictures_have_a_quarter_of_the_rows(repository, native_side, rows):
    config = PipelineConfig.load(repository / "text_to_image_stream" / "1" / "pipeline.json")
    sized = replace(config, native_width=native_side, native_height=native_side)
    found = capacities(sized, rows)
    assert found[0].side == native_side
    assert found[0].rows == rows
    assert found[-1].side == sized.max_side == max(native_side, min(4 * native_side, MAX_SIDE))
    for smaller, larger in itertools.pairwise(found):
        assert smaller.side < larger.side <= 2 * smaller.side
        assert larger.rows == max(2, smaller.rows // 4)


def test_larger_pictures_share_smaller_calls_and_no_bucket_pads_past_them(repository, watched):
    engine = open_engine(repository, watched, limits=Limits(16, (1, 3, 8)))
    for side, calls in ((32, [8]), (48, [4, 3]), (64, [4, 3]), (80, [2, 2, 2, 1])):
        watched.calls.clear()
        asked = request(engine, num_images=7, steps=1, guidance_scale=1.0, height=side)
        assert Client(engine, asked).error is None
        assert watched.calls == calls
    engine.close()


def test_what_waits_has_drawn_no_noise(repository, watched):
    engine = open_engine(repository, watched, limits=Limits(2))
    reached, hold = threading.Event(), threading.Event()
    watched.before_unet = lambda inputs: (reached.set(), hold.wait(10))
    client = Client(engine, request(engine, num_images=4, steps=1, guidance_scale=1.0))
    assert reached.wait(10)
    drawn = [
        hasattr(engine._images[claim].painting, "latent") for claim in client.generation.claims
    ]
    hold.set()
    assert client.error is None
    assert drawn == [True, True, False, False]
    engine.close()


@pytest.mark.parametrize("broken", [1, 4])
def test_a_failing_encoder_call_fails_only_who_fails_alone(repository, watched, caplog, broken):
    engine = open_engine(repository, watched)
    run, reached, hold = watched.models.run, threading.Event(), threading.Event()

    def refuse(model, inputs):
        if model == "clip_text":
            reached.set()
            hold.wait(10)
            if len(inputs["input_ids"]) > 1 or broken == 4:
                raise RuntimeError("too many texts")
        return run(model, inputs)

    watched.models.run = refuse  # type: ignore[method-assign]
    fields = {"guidance_scale": 1.0, "steps": 1}
    clients = [Client(engine, request(engine, PROMPTS[0], **fields))]
    assert reached.wait(10)
    clients += [Client(engine, request(engine, prompt, **fields)) for prompt in PROMPTS[1:]]
    hold.set()
    codes = [client.error and client.error.code for client in clients]
    assert codes == ([None] * 4 if broken == 1 else ["INTERNAL"] * 4)
    assert "too many texts" in caplog.text
    engine.close()


def test_what_a_network_says_of_a_shutdown_is_what_clients_are_told(repository, watched, caplog):
    engine = open_engine(repository, watched)

    def end(inputs):
        raise EngineError.of_shutdown()

    watched.before_unet = end
    error = Client(engine, request(engine)).error
    assert (error.code, str(error)) == ("UNAVAILABLE", "the server is shutting down")
    assert not caplog.text
    engine.close()


def test_what_has_ended_is_freed_at_once(engine):
    gc.collect()
    gc.disable()
    try:
        client = Client(engine, request(engine, num_images=2, steps=2)).wait()
        generation = weakref.ref(client.generation)
        del client.generation
        Client(engine, request(engine, steps=1)).wait()  # what the threads hold is of this one
        Client(engine, request(engine, steps=1)).wait()
        assert generation() is None
    finally:
        gc.enable()


def test_a_client_that_cannot_be_answered_harms_nobody(engine):
    def break_off(client, event):
        if isinstance(event, Progress):
            raise OSError("gone")

    gone = Client(engine, request(engine, steps=4), break_off)
    assert Client(engine, request(engine)).error is None
    assert gone.error.code == "INTERNAL"


def test_closing_ends_every_request(repository):
    engine = open_engine(repository)
    clients = [Client(engine, request(engine, steps=50, seed=i)) for i in range(8)]
    engine.close()
    assert {client.error.code for client in clients} == {"UNAVAILABLE"}
    with pytest.raises(EngineError, match="shutting down"):
        Client(engine, request(engine))


def test_closing_loses_no_end_that_is_on_its_way(repository):
    engine = open_engine(repository)
    client = Client(engine, request(engine, steps=50))
    replies, begun = engine._to_reply, threading.Event()

    class Slow:
        get = replies.get

        def put(self, item):
            if item and item[1].func is End:
                begun.set()
                time.sleep(0.3)
            replies.put(item)

    engine._to_reply = Slow()
    cancel = threading.Thread(target=client.generation.cancel)
    cancel.start()
    assert begun.wait(10)
    engine.close()
    cancel.join()
    assert client.ended.is_set()


def test_prompts_are_encoded_once(repository, watched):
    engine = open_engine(repository, watched)
    encoded = []
    run = watched.models.run
    watched.models.run = lambda model, inputs: (  # type: ignore[method-assign]
        encoded.append((model, len(next(iter(inputs.values()))))),
        run(model, inputs),
    )[1]
    for seed in range(3):
        assert Client(engine, request(engine, seed=seed, guidance_scale=3.0)).error is None
    assert encoded.count(("clip_text", 2)) == 1
    assert sum(model == "fusion" for model, _ in encoded) == 1
    engine.close()


def test_a_truncated_prompt_is_reported(engine):
    client = Client(engine, request(engine, "very " * 30 + "red circle")).wait()
    finished = next(event for event in client.events if isinstance(event, Finished))
    assert any("truncated to the 16 of clip_text" in text for text in finished.warnings)


def test_a_negative_prompt_without_effect_is_reported(engine):
    fields = {"negative_prompt": "rings", "guidance_scale": 1.0}
    client = Client(engine, request(engine, **fields)).wait()
    finished = next(event for event in client.events if isinstance(event, Finished))
    assert finished.warnings == ("negative_prompt has no effect at guidance_scale 1",)


def test_a_distilled_checkpoint_takes_one_row_and_honours_a_negative_prompt(distilled_repository):
    watched = Watched(distilled_repository)
    engine = open_engine(distilled_repository, watched)
    plain = Client(engine, request(engine, guidance_scale=8.0, steps=2)).images
    weaker = Client(engine, request(engine, guidance_scale=2.0, steps=2)).images
    assert watched.calls == [1] * 4
    assert plain != weaker
    led_away = Client(
        engine, request(engine, guidance_scale=8.0, steps=2, negative_prompt="rings")
    ).images
    assert watched.calls[4:] == [2] * 2
    assert led_away != plain
    engine.close()


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_every_size_is_painted(engine, width):
    image = pixels(Client(engine, request(engine, width=width, height=32)).images[0])
    assert image.shape == (32, width, 3)


@pytest.mark.parametrize(
    ("name", "text"), [("max_rows", None), ("max_rows", "0"), ("queue_size", "many"),
                       ("queue_size", "1, 2"), ("row_buckets", "1,x"), ("row_buckets", None)],
)  # fmt: skip
def test_a_parameter_that_is_no_number_is_named(name, text):
    config = {"parameters": {} if text is None else {name: {"string_value": text}}}
    with pytest.raises(ValueError, match=f"parameter {name} of config.pbtxt is .*over 0"):
        whole_numbers(config, name, None if name == "row_buckets" else 1)


PARAMETERS = """
# parameters { key: "max_rows" value: { string_value: "1" } }
parameters { key: "max_rows" value: { string_value: "7" } }  # key: "max_rows"
parameters {
  key: 'row_buckets'
  value { string_value: '1, 2' }
}
parameters: [
  { key: "a", value: { string_value: "#1" } }, { key: "b" value: { string_value: "x" } }
]
"""


def test_parameters_are_read_as_protobuf_reads_them(tmp_path):
    file = tmp_path / "config.pbtxt"
    file.write_text(PARAMETERS)
    assert len(read_config(file)["parameters"]) == 4
    for path in (file, *ROOT.glob("model_repository/*/config.pbtxt")):
        found, expected = read_parameters(path), read_config(path).get("parameters", {})
        assert found["parameters"] == {
            name: {"string_value": entry.get("string_value", "")}
            for name, entry in expected.items()
        }


def test_row_buckets_may_be_empty():
    for entry in ({"string_value": ""}, {}):  # as Triton's JSON and as protobuf's has it
        assert whole_numbers({"parameters": {"row_buckets": entry}}, "row_buckets") == []
