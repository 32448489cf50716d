# For CPUs: docker build -t flowspec . && docker run --rm flowspec run --prompt "def add(a, b):"
# For GPUs: docker build --build-arg BASE=IMAGE -t flowspec . with an image that has torch 2.13.0 for your CUDA, and docker run --gpus all
# One rank of several hosts: docker run --network host --entrypoint torchrun flowspec (torchrun's options) -m flowspec run CONFIG
ARG BASE=python:3.12-slim
FROM $BASE
WORKDIR /src
COPY requirements.txt .
# The second index has torch without CUDA, 2.13.0+cpu, which comes before 2.13.0; a torch that BASE has stays.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps . && useradd --create-home flowspec
USER flowspec
WORKDIR /home/flowspec
ENTRYPOINT ["python", "-m", "flowspec"]
