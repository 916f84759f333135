# The package on Ray's image, with the exact versions of constraints.txt: what `fot manifest --image` runs on Kubernetes.
#
#   docker build --tag registry.example/fot:1 .
#   docker build --tag registry.example/fot:1 --build-arg EXTRAS=s3,lm_eval .
#
# Builds and runs as Ray's user (1000, group 100). torch is the build for CUDA 13, which runs without a GPU, too.
FROM rayproject/ray:2.60.0-py311-gpu
ARG EXTRAS=s3
RUN mkdir /home/ray/fot
COPY --chown=ray:users pyproject.toml README.md LICENSE constraints.txt /home/ray/fot/
COPY --chown=ray:users fot_model /home/ray/fot/fot_model
COPY --chown=ray:users pipelines /home/ray/fot/pipelines
COPY --chown=ray:users jobs /home/ray/fot/jobs
RUN DS_BUILD_OPS=0 PIP_CONSTRAINT=/home/ray/fot/constraints.txt pip install --no-cache-dir "/home/ray/fot[$EXTRAS]"
