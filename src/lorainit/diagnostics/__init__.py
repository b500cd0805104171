"""What a start is worth: tangent spaces, update sizes, curvature, boundary agreement, learning rates."""
