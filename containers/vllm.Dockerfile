# vLLM with the plugin, from the repository's root:
#     docker build -f containers/vllm.Dockerfile -t k26-vllm .
#     docker run --gpus all --ipc=host -p 8000:8000 -v /path/of/the/checkpoint:/model:ro k26-vllm
# It plans, looks at the machine as `k26 doctor` does, and becomes the engine's own command; what is wrong ends it with the reason.
ARG VERSION=0.33.0

FROM python:3.11-slim AS wheel
COPY . /source
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM vllm/vllm-openai:v${VERSION}
# The engine's own packages stay as they are: they satisfy what the plugin asks for, all but PyAV.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels python3 -m pip install --no-cache-dir /wheels/*.whl
# Compiled experts and kernels are kept here: a volume saves the compiling at each start.
ENV XDG_CACHE_HOME=/var/cache/k26
VOLUME /var/cache/k26
EXPOSE 8000
# Reading 595 GB takes minutes to an hour, by the disk.
HEALTHCHECK --start-period=60m --interval=30s --timeout=10s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8000/health')"]
ENTRYPOINT ["k26", "serve", "--engine", "vllm"]
CMD ["/model", "--", "--host", "0.0.0.0", "--port", "8000"]
