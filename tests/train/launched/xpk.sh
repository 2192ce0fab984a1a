#!/bin/sh
xpk workload create --cluster=c --workload=mixtral-8x7b-v5p-64 --docker-image=i --tpu-type=v5p-64 --num-slices=1 --restart-on-exit-codes=74,75,76,124 --max-restarts=10 '--command=printf %s c3RhZ2U6IHByZXRyYWluCi4uLgo= | base64 -d > /tmp/run.yaml && exec python -P -m mixtral_jax.launch pretrain /tmp/run.yaml'
