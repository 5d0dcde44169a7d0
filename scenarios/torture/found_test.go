package torture

// found are programs by seed that broke an invariant once, and of what bug.
var found = map[uint64]string{
	51027714764562: "none: that the campaign's programs run at all",
}
