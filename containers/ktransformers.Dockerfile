# A hybrid run in SGLang, KTransformers' way: some experts on the GPUs, the others in the host's memory. From the repository's root:
#     docker build -f containers/ktransformers.Dockerfile -t k26-ktransformers .
#     docker run --gpus all --ipc=host -p 8000:8000 -v /path/of/the/checkpoint:/model:ro k26-ktransformers
# It plans, looks at the machine as `k26 doctor` does, and becomes the engine's own command; what is wrong ends it with the reason.
ARG VERSION=0.5.23

FROM python:3.11-slim AS wheel
COPY . /source
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM lmsysorg/sglang:v${VERSION}
# The engine's own packages stay as they are: they satisfy what the plugin asks for, all but PyAV.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels python3 -m pip install --no-cache-dir /wheels/*.whl
# kt-kernel's CPU experts without its own sgl_kernel, which would overwrite SGLang's: for K26_CPU_EXPERTS=kt.
COPY ci/install_kt_kernel.py ci/packages.py /opt/k26/
RUN python3 /opt/k26/install_kt_kernel.py 0.7.2
# Compiled experts and kernels are kept here: a volume saves the compiling at each start.
ENV XDG_CACHE_HOME=/var/cache/k26
VOLUME /var/cache/k26
EXPOSE 8000
# Reading 595 GB takes minutes to an hour, by the disk.
HEALTHCHECK --start-period=60m --interval=30s --timeout=10s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8000/health')"]
ENTRYPOINT ["k26", "serve", "--engine", "ktransformers"]
CMD ["/model", "--", "--host", "0.0.0.0", "--port", "8000"]
