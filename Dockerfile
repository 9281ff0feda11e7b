# The quickstart in a container, on CPUs or NVIDIA GPUs. docs/installing.md shows how to build and run it.
FROM python:3.11-slim-bookworm

# cpu, or cuda for NVIDIA GPUs (several GB more)
ARG TORCH=cpu
ENV TORCH=${TORCH} PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics

RUN apt-get update && apt-get install -y --no-install-recommends make libegl1 libgl1-mesa-dri libosmesa6 && rm -rf /var/lib/apt/lists/*

WORKDIR /ript
# First what changes seldom: the packages stay in a layer of their own.
COPY tools/setup.py tools/setup.py
COPY requirements.lock ./
RUN python3.11 tools/setup.py --torch ${TORCH}

COPY . .
CMD ["make", "quickstart"]
