# mixtral-jax in a container: docker build --build-arg EXTRA=tpu -t mixtral-jax:tpu .   (EXTRA: cpu, tpu or cuda)
# Layers change from below to above as rarely as from above to below: system, dependencies, code.
FROM python:3.12-slim
ARG EXTRA=cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /mixtral-jax
COPY pyproject.toml constraints.txt README.md LICENSE ./
# the dependencies alone, as they are bound in pyproject.toml, so that a change of the code installs nothing again
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*p['dependencies'], *p['optional-dependencies']['${EXTRA}'] if '${EXTRA}' != 'cpu' else '', sep='\n')" > /tmp/needed \
    && pip install --requirement /tmp/needed --constraint constraints.txt
COPY . .
RUN pip install --no-deps .
# exec form: the process is number 1 of its container and hears the SIGTERM of a pod that is taken away
ENTRYPOINT ["mixtral-jax"]
CMD ["--help"]
