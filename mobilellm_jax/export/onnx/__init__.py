"""Writes models as ONNX files, and runs these files in ONNX Runtime."""
