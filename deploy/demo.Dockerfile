# The demo's tiny inference server and its trainer: torch (CPU), for trying the fleet on a laptop.
FROM python:3.11-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY common common
COPY engines engines
COPY producer producer
COPY worker worker
COPY console console
COPY demo demo
# The index decides the build of torch; its version is the range of pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch>=2.3" \
    && pip install --no-cache-dir ".[demo]" \
    && useradd --system --uid 10001 --create-home rollfleet \
    && mkdir /weights && chown rollfleet /weights
USER 10001
WORKDIR /home/rollfleet
ENTRYPOINT ["python", "-m"]
