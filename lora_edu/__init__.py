"""LoRA, measured: the helper package of the course.

Sub-modules are imported when they are first asked for, so that `lora_edu.counting` costs no torch.
"""
