#!/bin/sh
xpk workload create --cluster=c --workload=sft-mixtral-8x7b-v5p-64 --docker-image=i --tpu-type=v5p-64 --num-slices=1 --restart-on-exit-codes=74,75,76,124 --max-restarts=10 --zone=z '--command=printf %s c3RhZ2U6IHNmdAouLi4K | base64 -d > /tmp/run.yaml && exec python -P -m mixtral_jax.launch sft /tmp/run.yaml'
