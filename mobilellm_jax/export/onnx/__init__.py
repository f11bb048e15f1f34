"""ONNX for ONNX Runtime: the writer, and the runtime that reads its file back."""
