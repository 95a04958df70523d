"""`python -m benchmarks.dashboard`: the panels of `deploy/grafana/twinbrush.json`, without Grafana.

Starts a server and a real Prometheus (`prometheus` must be on PATH), puts a mixed load on the
server, asks Prometheus for what every panel shows, and draws that.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.faults.serving import HOST, Serving, serving
from twinbrush.server.addresses import chosen_ports
from twinbrush_client import TwinbrushError

DASHBOARD = Path("deploy/grafana/twinbrush.json")
WINDOW = "15s"  # of rates, as Grafana's $__rate_interval
SCRAPE = "2s"
COLUMNS = 4
CLIENTS = 10
SIDES = (1, 1, 1, 0.5, 2)  # of pictures, over the native one


def main(
    repository: Annotated[Path, typer.Option(help="Exported model repository.")] = Path(
        "model_repository"
    ),
    seconds: Annotated[float, typer.Option(min=30, help="Length of the load.")] = 90.0,
    out: Annotated[Path, typer.Option(help="Picture.")] = Path("docs/images/dashboard.png"),
) -> None:
    """Draws the dashboard of a load."""
    with serving(repository) as server, prometheus(server.metrics) as url:
        began = time.time()
        load(server, seconds)
        time.sleep(3.0)  # two scrapes
        panels = [
            (panel, [series(url, target, began, time.time()) for target in panel["targets"]])
            for panel in json.loads(DASHBOARD.read_text())["panels"]
        ]
    draw(panels, out)
    print(json.dumps({"panels": len(panels), "bytes": out.stat().st_size}))


@contextmanager
def prometheus(target: int) -> Iterator[str]:
    """The URL of a Prometheus that scrapes a port of this machine."""
    port = chosen_ports(HOST, 0, 0, 0)[0]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "prometheus.yml"
        config.write_text(
            f"global: {{scrape_interval: {SCRAPE}}}\n"
            "scrape_configs:\n"
            f"  - {{job_name: twinbrush, static_configs: [{{targets: ['{HOST}:{target}']}}]}}\n"
        )
        command = [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={HOST}:{port}", "--log.level=error",
        ]  # fmt: skip
        try:
            process = subprocess.Popen(command)
        except FileNotFoundError:
            sys.exit("error: prometheus is not installed: apt-get install prometheus")
        try:
            url = f"http://{HOST}:{port}"
            while True:
                with suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=2):
                    break
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()


def load(server: Serving, seconds: float) -> None:
    """Clients of several sizes, of whom some cancel, some are wrong, and some wait in between."""
    stopping = threading.Event()

    def run(number: int) -> None:
        rng = random.Random(number)
        with server.client() as client:
            side = client.info().defaults["width"]
            while not stopping.is_set():
                fields: dict[str, Any] = {"steps": rng.choice((4, 8, 20)), "seed": number}
                fields["width"] = fields["height"] = int(side * rng.choice(SIDES))
                prompt = f"a red circle {rng.randrange(30)}"
                kind = rng.random()
                fields["steps"] = 50 if kind < 0.1 else 99 if kind < 0.15 else fields["steps"]
                with suppress(TwinbrushError):
                    if kind < 0.1:
                        for _ in client.stream(prompt, **fields):
                            break
                    else:
                        client.generate(prompt, **fields)
                stopping.wait(rng.random() * 0.2)

    threads = [threading.Thread(target=run, args=[k], daemon=True) for k in range(CLIENTS)]
    for k, thread in enumerate(threads):
        thread.start()
        time.sleep(seconds / 4 / CLIENTS if k else 0.0)  # the load grows
    time.sleep(seconds * 3 / 4)
    stopping.set()
    for thread in threads:
        thread.join(60)


def series(url: str, target: dict, began: float, ended: float) -> list[tuple[str, list, list]]:
    """(label, seconds, values) of each series of a panel's target."""
    query = target["expr"].replace("$__rate_interval", WINDOW)
    asked = {"query": query, "start": began, "end": ended, "step": 2}
    path = f"{url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
    with urllib.request.urlopen(path, timeout=30) as answer:
        results = json.load(answer)["data"]["result"]
    found = []
    for result in results:
        label = target["legendFormat"]
        for name, value in result["metric"].items():
            label = label.replace("{{" + name + "}}", value)
        times, values = zip(*result["values"], strict=True)
        found.append((label, [t - began for t in times], [float(v) for v in values]))
    return found


def draw(panels: list[tuple[dict, list]], out: Path) -> None:
    """A grid of lines, one plot a panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 2.6 * rows), dpi=72)
    for axis, (panel, targets) in zip(axes.flat, panels, strict=False):
        for label, times, values in (line for lines in targets for line in lines):
            axis.plot(times, values, linewidth=1, label=label)
        axis.set_title(panel["title"], fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(fontsize=6, loc="upper left")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


if __name__ == "__main__":
    typer.run(main)
