# Production image: NVIDIA's Triton with its native ONNX Runtime and TensorRT backends.
# Export first (`python -m export CHECKPOINT`), then:
#   docker build -t twinbrush . && docker run --init --gpus all --shm-size 1g -p 8000-8002:8000-8002 twinbrush
FROM nvcr.io/nvidia/tritonserver:26.10-py3

ENV PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1
WORKDIR /opt/twinbrush
COPY pyproject.toml README.md LICENSE ./
COPY twinbrush ./twinbrush
RUN pip install --no-cache-dir . && useradd --create-home --uid 10001 twinbrush
# What `python3 -m export.tensorrt` needs, to build plans in here.
COPY export/__init__.py export/staging.py export/tensorrt.py export/triton_config.py ./export/
COPY --chown=10001 model_repository ./model_repository

USER 10001
# HTTP, gRPC, metrics; 8003 answers probes, and knows of restarts and the drain.
EXPOSE 8000 8001 8002 8003
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8003/ready', timeout=2)"]
# What follows the image's name is added: `--config-name tensorrt`.
ENTRYPOINT ["python3", "-m", "twinbrush.server", "--repository", "/opt/twinbrush/model_repository", "--address", "0.0.0.0", "--health-port", "8003", "--restart"]
