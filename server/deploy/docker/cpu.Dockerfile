# The CPU. Build from the repository's root: docker build -f server/deploy/docker/cpu.Dockerfile -t quire:cpu .
FROM python:3.12-slim-bookworm

RUN useradd --create-home quire && mkdir /cache && chown quire /cache
COPY . /opt/quire
RUN pip install --no-cache-dir /opt/quire

USER quire
# Compiled programs and downloaded models: mount a volume here, and the next start is a quick one.
ENV QUIRE_CACHE=/cache/quire HF_HOME=/cache/huggingface
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=60m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
# In this form SIGTERM reaches the server itself, which drains.
ENTRYPOINT ["quire", "serve", "--host", "0.0.0.0"]
CMD ["demo"]
