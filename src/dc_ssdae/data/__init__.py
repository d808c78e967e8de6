"""Images in and out: files, pixel ranges, transforms, and the demo's photos."""
