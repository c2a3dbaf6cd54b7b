"""Looking into a trained model: features, attention, what each part contributes."""
