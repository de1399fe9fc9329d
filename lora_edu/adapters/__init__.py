"""Adapters as files: extracted, merged, inspected, resized, each by a command of its own (`main(arguments) -> int`).

Files in, files out, one tensor at a time; the arithmetic is that of lora/, what stands in files that of delta/.
"""
