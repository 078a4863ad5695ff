"""Configurations of ``accelerate launch`` for one GPU, DDP and FSDP2.

accelerate launch --config_file $(python -m steer_optim.vlm.configs fsdp2) -m steer_optim.vlm.train ...
"""
