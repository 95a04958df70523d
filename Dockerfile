# Production image: NVIDIA's Triton with its native ONNX Runtime and TensorRT backends.
# Export first (`python -m export CHECKPOINT`), then: docker build -t twinbrush .
FROM nvcr.io/nvidia/tritonserver:26.10-py3

WORKDIR /opt/twinbrush
COPY pyproject.toml README.md LICENSE ./
COPY twinbrush ./twinbrush
RUN pip install --no-cache-dir . && useradd --create-home --uid 10001 twinbrush
COPY --chown=twinbrush model_repository ./model_repository

USER twinbrush
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s \
    CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/v2/health/ready"]
ENTRYPOINT ["python3", "-m", "twinbrush.server"]
CMD ["--repository", "/opt/twinbrush/model_repository", "--address", "0.0.0.0", "--restart"]
