# Trainium and Inferentia. Build from the root: docker build -f server/deploy/docker/neuron.Dockerfile -t quire:neuron .
# AWS's packages come from AWS's own index; run with --device=/dev/neuron0 (one per chip that is used).
FROM python:3.11-slim-bookworm

# Versions of the SDK that the instance's driver supports, as AWS lists them.
ARG NEURON_INDEX=https://pip.repos.neuron.amazonaws.com
ARG NEURON_PACKAGES="jax-neuronx libneuronxla neuronx-cc"

RUN useradd --create-home quire && mkdir /cache && chown quire /cache
COPY . /opt/quire
RUN pip install --no-cache-dir --extra-index-url ${NEURON_INDEX} ${NEURON_PACKAGES} /opt/quire

USER quire
# Compiled programs and downloaded models: mount a volume here, and the next start is a quick one.
ENV QUIRE_CACHE=/cache/quire HF_HOME=/cache/huggingface
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=60m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
# In this form SIGTERM reaches the server itself, which drains.
ENTRYPOINT ["quire", "serve", "--host", "0.0.0.0"]
CMD ["demo"]
