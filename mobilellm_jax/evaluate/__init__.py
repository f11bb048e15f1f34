"""How good a model is: functions of (model config, parameters, data), with no flags and no files."""
