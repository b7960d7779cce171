"""The artifact commit: content-addressed artifacts over file:// and s3:// stores."""
