# README's first command on a CPU:
#   docker build -t flowleak . && docker run --rm -v "$PWD/runs:/flowleak/runs" flowleak
FROM python:3.12-slim

# Ray and Flower work as an ordinary user; what they leave belongs to it.
RUN useradd --create-home auditor
WORKDIR /flowleak
COPY --chown=auditor . .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -e '.[server]' \
    && mkdir -p runs && chown auditor runs .
USER auditor

CMD ["flwr", "run", ".", "local-simulation", "--stream"]
