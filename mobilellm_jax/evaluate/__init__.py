"""How good a model is: functions of (model config, parameters, data), without flags or files."""
